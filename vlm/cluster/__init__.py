"""Multi-process runs: rendezvous, synchronisation, and failure reports."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.cluster.processes import broadcast_text as broadcast_text
    from vlm.cluster.processes import first_process_first as first_process_first
    from vlm.cluster.processes import start as start
    from vlm.cluster.processes import stop_all_on_failure as stop_all_on_failure
