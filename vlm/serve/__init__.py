"""A model behind HTTP: requests of many clients in joint batches, and a page to search by."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.serve.app import create_app as create_app
    from vlm.serve.batched import Batched as Batched
    from vlm.serve.limits import Limits as Limits
    from vlm.serve.running import serve as serve
