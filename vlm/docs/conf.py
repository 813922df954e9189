"""Sphinx settings of the documentation; `vlm docs` runs Sphinx on a copy of this folder."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from docutils import nodes  # noqa: E402
from sphinx.domains.python import PyXRefRole  # noqa: E402
from sphinx.ext.autodoc.mock import mock  # noqa: E402 # pyright: ignore[reportPrivateImportUsage]

from vlm import __version__  # noqa: E402

# Packages of extras, and those that some systems lack: their names are documented all the same.
autodoc_mock_imports = [
    name
    for name in (
        "array_record",
        "fastapi",
        "grain",
        "prometheus_client",
        "tensorflow_datasets",
        "uvicorn",
    )
    if importlib.util.find_spec(name) is None
]
with mock(autodoc_mock_imports):
    import reference_pages

    reference_pages.write(HERE / "reference")

project = "vlm"
author = "The vlm authors"
copyright = author
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "index"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["reference/tables"]

# Pages. Formulas are code, because MathJax would be loaded from the network.
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are stored with their outputs
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Reference.
default_role = "name"
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"

# Appearance: everything comes from this folder and the theme, nothing from the network.
html_theme = "furo"
html_title = f"vlm {version}"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["vlm.css"]
html_copy_source = False
html_show_sphinx = False
html_use_index = False  # the search finds names
html_domain_indices = False
html_theme_options = {"top_of_page_buttons": []}


class Name(PyXRefRole):
    """Backticks in docstrings: code, and a link if it is a public name such as `vlm.load`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return a literal for words, which would find names that they do not mean."""
        if "." not in self.text and not self.text[:1].isupper():
            return [nodes.literal(self.rawtext, self.text)], []
        self.name = "py:obj"
        return super().run()


def index_pages(app, failure):
    """Write the index that `_static/search.js` searches."""
    if failure is None:
        line = [sys.executable, "-m", "pagefind", "--site", str(app.outdir)]
        line += [
            "--root-selector",
            "article[role=main]",
            "--exclude-selectors",
            ".headerlink, .toctree-wrapper, #changelog",  # which has every word
        ]
        subprocess.run([*line, "--quiet"], check=True)


def shorten(app, what, name, thing, options, signature, result):
    """Leave the modules of array types out of signatures: jaxtyping writes them in full."""
    arrays = r"(?<![~\w.])(?:[a-z_]\w*\.)+(?=[A-Z]|ndarray)"
    return [text and re.sub(arrays, "", text) for text in (signature, result)]


def finish_body(app, page, template, context, doctree):
    """Give headings the ids of their sections, so that the search links to them, and let the
    keyboard scroll wide code. The search prefers guides to lists of names.
    """
    if "body" in context:
        body = re.sub(
            r'<section id="([^"]+)">\n<h([2-6])>', r'<section>\n<h\2 id="\1">', context["body"]
        )
        if page.startswith("reference/"):
            body = body.replace("<section", '<section data-pagefind-weight="0.5"', 1)
        context["body"] = body.replace("<pre>", '<pre tabindex="0">')


def setup(app):
    """Connect to Sphinx."""
    app.add_role("name", Name())
    app.connect("autodoc-process-signature", shorten)
    app.connect("html-page-context", finish_body)
    app.connect("build-finished", index_pages)
