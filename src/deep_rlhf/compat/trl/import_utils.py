"""Names that scripts import from `trl.import_utils`."""

from transformers.utils import is_peft_available
from transformers.utils import is_torch_npu_available as is_npu_available
from transformers.utils import is_torch_xpu_available as is_xpu_available

__all__ = ["is_npu_available", "is_peft_available", "is_xpu_available"]
