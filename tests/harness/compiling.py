"""How tests compile: quickly on a CPU, as users do where a test asks for it.

Compiling is most of what tests take. Without LLVM's optimizations and XLA's newer code generator
for fusions it takes an eighth of the time.
"""

# Of XLA_FLAGS; tests/conftest.py adds them.
QUICKLY = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)

# The same options with their default values, for `compiler_options` of a single program.
AS_USERS_COMPILE = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
