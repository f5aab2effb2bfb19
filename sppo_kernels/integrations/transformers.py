"""SPPO for any transformers causal language model: plain PyTorch, Trainer, Accelerate, PEFT, DDP.

loss, logps = model_sppo_loss(model, input_ids, labels, ref_logps, win_rate, attention_mask)
"""

from sppo_kernels.models.log_probs import model_sequence_logps, model_sppo_loss, model_token_logps
from sppo_kernels.models.refusals import HeadProbeError

__all__ = ["HeadProbeError", "model_sequence_logps", "model_sppo_loss", "model_token_logps"]
