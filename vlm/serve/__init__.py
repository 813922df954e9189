"""HTTP server for a model, with dynamic batching across clients and a web search page."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.serve.app import create_app as create_app
    from vlm.serve.batched import Batched as Batched
    from vlm.serve.limits import Limits as Limits
    from vlm.serve.server import serve as serve
