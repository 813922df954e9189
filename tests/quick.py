"""Programs that compile in half the time and run slower: what is tested is what they compute."""

from importlib.metadata import version

# For `compiler_options`: as users compile, where a test is of what the compiler makes of a program.
AS_USERS: dict[str, bool] = {}
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith(("0.10.", "0.11.")):  # later ones do not know it
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
