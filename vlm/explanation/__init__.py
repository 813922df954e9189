"""Explanations: relevance heat maps, zero-shot segmentation, and 2-D maps of embeddings."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.explanation.curves import faithfulness as faithfulness
    from vlm.explanation.heat_map import Explanation as Explanation
    from vlm.explanation.heat_map import explain as explain
    from vlm.explanation.projection import EmbeddingMap as EmbeddingMap
    from vlm.explanation.projection import embedding_map as embedding_map
    from vlm.explanation.segmentation import Segmentation as Segmentation
    from vlm.explanation.segmentation import segment as segment
