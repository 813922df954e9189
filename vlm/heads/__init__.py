"""Heads: zero-shot and few-shot classification, and retrieval, over a model's embeddings.

Every head takes an object with this interface, as returned by `vlm.load`:

    encode_image(images, batch_size=...)  (n, d) float32, unit norm
    encode_text(texts)                    (m, d) float32, unit norm
    logit_scale, logit_bias               the logits are scale * cosine + bias
    loss                                  "softmax" or "sigmoid": how logits become scores
    name                                  the name of the model
    fingerprint                           hash of its weights file (optional)
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.heads.exchange import read_clip_retrieval as read_clip_retrieval
    from vlm.heads.exchange import write_clip_retrieval as write_clip_retrieval
    from vlm.heads.faiss_index import faiss_search as faiss_search
    from vlm.heads.faiss_index import to_faiss as to_faiss
    from vlm.heads.few_shot import FewShotClassifier as FewShotClassifier
    from vlm.heads.labels import read_labels as read_labels
    from vlm.heads.labels import read_templates as read_templates
    from vlm.heads.neighbours import NeighbourClassifier as NeighbourClassifier
    from vlm.heads.prompted import PromptedClassifier as PromptedClassifier
    from vlm.heads.prompts import TEMPLATES as TEMPLATES
    from vlm.heads.query import Query as Query
    from vlm.heads.retrieval import RetrievalIndex as RetrievalIndex
    from vlm.heads.saved import load_classifier as load_classifier
    from vlm.heads.zero_shot import Classification as Classification
    from vlm.heads.zero_shot import ZeroShotClassifier as ZeroShotClassifier
