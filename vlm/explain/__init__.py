"""Explanations: relevance heat maps, zero-shot segmentation, and 2-D maps of embeddings.

The subpackage is callable: `vlm.explain(model, image, text)` is `vlm.explain.explain`.
"""

import sys
import types

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.explain.curves import faithfulness as faithfulness
    from vlm.explain.explanation import Explanation as Explanation
    from vlm.explain.explanation import explain as explain
    from vlm.explain.projection import EmbeddingMap as EmbeddingMap
    from vlm.explain.projection import embedding_map as embedding_map
    from vlm.explain.segmentation import Segmentation as Segmentation
    from vlm.explain.segmentation import segment as segment


class _Callable(types.ModuleType):
    def __call__(self, model, image, text, **options):
        """See `vlm.explain.explain`."""
        from vlm.explain.explanation import explain

        return explain(model, image, text, **options)


sys.modules[__name__].__class__ = _Callable
