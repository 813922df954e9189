"""HTTP server for a model, with dynamic batching across clients and a web search page."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.serving.app import create_app as create_app
    from vlm.serving.batched import Batched as Batched
    from vlm.serving.limits import Limits as Limits
    from vlm.serving.server import serve as serve
