from tests.harness.compiling import compile_quickly  # noqa: F401
