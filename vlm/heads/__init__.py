"""Heads: zero-shot and few-shot classification, and retrieval, over a model's embeddings.

Every head takes a model from `vlm.load`, or any other object with the interface of `Encoder`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.heads.encoder import Encoder as Encoder
    from vlm.heads.exchange import read_clip_retrieval as read_clip_retrieval
    from vlm.heads.exchange import write_clip_retrieval as write_clip_retrieval
    from vlm.heads.faiss_index import faiss_search as faiss_search
    from vlm.heads.faiss_index import to_faiss as to_faiss
    from vlm.heads.few_shot import FewShotClassifier as FewShotClassifier
    from vlm.heads.labels import read_labels as read_labels
    from vlm.heads.labels import read_templates as read_templates
    from vlm.heads.multi_vector import MultiVectorIndex as MultiVectorIndex
    from vlm.heads.neighbours import NeighbourClassifier as NeighbourClassifier
    from vlm.heads.prompted import PromptedClassifier as PromptedClassifier
    from vlm.heads.prompts import TEMPLATES as TEMPLATES
    from vlm.heads.query import Query as Query
    from vlm.heads.retrieval import RetrievalIndex as RetrievalIndex
    from vlm.heads.saved import load_classifier as load_classifier
    from vlm.heads.token_embeddings import image_tokens as image_tokens
    from vlm.heads.token_embeddings import text_tokens as text_tokens
    from vlm.heads.video_encoder import VideoEncoder as VideoEncoder
    from vlm.heads.zero_shot import Classification as Classification
    from vlm.heads.zero_shot import ZeroShotClassifier as ZeroShotClassifier
