"""Why a model says so: heat maps, masks and maps of embeddings.

The room is a function too: `vlm.explain(model, image, text)` is `vlm.explain.explain`.
"""

import sys
import types

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.explain.curves import faithfulness as faithfulness
    from vlm.explain.explanation import Explanation as Explanation
    from vlm.explain.explanation import explain as explain
    from vlm.explain.segmentation import Segmentation as Segmentation
    from vlm.explain.segmentation import segment as segment
    from vlm.explain.set_map import EmbeddingMap as EmbeddingMap
    from vlm.explain.set_map import embedding_map as embedding_map


class _Callable(types.ModuleType):
    def __call__(self, model, image, text, **options):
        """See `vlm.explain.explain`."""
        from vlm.explain.explanation import explain

        return explain(model, image, text, **options)


sys.modules[__name__].__class__ = _Callable
