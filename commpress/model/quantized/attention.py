"""nn.MultiheadAttention with a fake quantiser: its projections of inputs, and that of outputs, whose module is never called.

torch's fused path of evaluation reads parameters past the quantiser; so it is not taken, and evaluation computes as training.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from commpress.model.quantized.weights import Quantized


class QuantizedMultiheadAttention(Quantized, nn.MultiheadAttention):
    """An attention whose weights are computed with as their codes say. Inputs are not rounded."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs and probabilities, as torch's own: [time, batch, width], or [batch, time, width] with `batch_first`."""
        how: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if not self.weight_fake_quantizer.enabled:
            return super().forward(query, key, value, **how)
        turn = self.batch_first and query.dim() == 3
        if turn:  # what is one tensor stays one: that is projected at once
            turned = key.transpose(0, 1)
            query = turned if query is key else query.transpose(0, 1)
            value = turned if value is key else value.transpose(0, 1)
            key = turned
        if self._qkv_same_embed_dim:
            inner = {"in_proj_weight": self.computed("in_proj_weight")}
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            inner = {"in_proj_weight": None, **{name: self.computed(name) for name in names}}
        outputs, probabilities = functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            in_proj_bias=self.in_proj_bias,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout,
            out_proj_weight=self.computed("out_proj.weight"),
            out_proj_bias=self.out_proj.bias,
            training=self.training,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            **inner,
            **how,
        )
        return outputs.transpose(0, 1) if turn else outputs, probabilities
