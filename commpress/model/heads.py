"""Attention heads: which attributes of a module say how many it has, and the Linear layers that they come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Heads:
    """An attention module that has these attributes: how many heads it has, and the Linear layers that they come from.

    One layer alone gives queries, keys and values one after another, [3 * heads * size of a head, inputs].
    """

    count: str
    layers: tuple[str, ...]
    width: str | None = None
    """The attribute that holds heads * size of a head, if there is one."""

    @property
    def parts(self) -> int:
        """How many times heads * size of a head are in a layer's outputs."""
        return 3 if len(self.layers) == 1 else 1


KNOWN = (
    Heads("heads", ("qkv",)),  # the training program's GPT
    Heads("num_attention_heads", ("query", "key", "value"), "all_head_size"),  # BERT and its kin in Transformers
    Heads("n_heads", ("q_lin", "k_lin", "v_lin")),  # DistilBERT
    Heads("num_heads", ("c_attn",), "split_size"),  # GPT-2
)


def attention_layers(model: nn.Module, heads: Sequence[Heads]) -> Iterator[tuple[nn.Module, tuple[nn.Module, Heads]]]:
    """(layer, (attention module, how)) of each layer that heads come from."""
    for name, module in model.named_modules():
        for how in heads:
            layers = [getattr(module, layer, None) for layer in how.layers]
            count = getattr(module, how.count, None)
            if isinstance(count, int) and all(isinstance(layer, nn.Linear) for layer in layers):
                widths = {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
                parts = count * how.parts
                if len(widths) > 1 or min(widths) % parts:
                    raise ValueError(
                        f"shrink: {name!r} has {count} heads, and {', '.join(how.layers)} have {sorted(widths)} outputs: "
                        f"expected one multiple of {parts}"
                    )
                yield from ((layer, (module, how)) for layer in layers if layer is not None)
