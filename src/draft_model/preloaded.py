"""What the server of `workers` loads once, before it forks, unseen by the garbage collector there and in the forks."""

import gc
from contextlib import suppress
from importlib import import_module

gc.disable()
for name in (
    "draft_model.dataset.encode", "draft_model.model_import.check", "transformers.modeling_utils",
    "transformers.models.auto.tokenization_auto", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.tokenization_llama", "transformers.models.llama.modeling_llama", "pyarrow.parquet",
):  # fmt: skip
    with suppress(ImportError):  # the image of the data set has no torch
        import_module(name)
gc.freeze()
gc.enable()
