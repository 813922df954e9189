"""Export of models to StableHLO and ONNX, which run without vlm.

A format is a module with `write(program, folder)`, `opened(program, folder)` and a few constants.
All share the programs (`programs`), the files beside them (`contract`), and the comparison of the
written program with the model (`bundle_export`).
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.exporting.bundle_export import Exported as Exported
    from vlm.exporting.bundle_export import export as export

del epy
