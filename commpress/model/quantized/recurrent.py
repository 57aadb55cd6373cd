"""nn.RNN, nn.LSTM and nn.GRU with a fake quantiser: a row of `weight_ih`, `weight_hh` or `weight_hr` makes up one gate's unit.

torch's own forward reads weights from a list of them. While it runs, that list has what is computed with. On CUDA they
are not one piece of memory then: cuDNN copies them in each call, and torch warns of it once.
"""

from typing import Any

from torch import Tensor, nn

from commpress.model.quantized.weights import Decoder, Quantized


class Recurrent(Quantized):
    """Recurrent layers whose weights are computed with as their codes say. Inputs are not rounded."""

    def forward(self: Any, x: Any, hx: Any = None) -> Any:
        """Outputs and last states, as torch's own: of a tensor, or a PackedSequence."""
        if not self.weight_fake_quantizer.enabled:
            return super().forward(x, hx)
        self._update_flat_weights()  # or torch's forward does, and undoes ours
        own = self._flat_weights
        self._flat_weights = [self._given(name) for name in self._flat_weights_names]
        try:
            return super().forward(x, hx)
        finally:
            self._flat_weights = own

    def _given(self, name: str) -> Tensor:
        given: Tensor = self.computed(name) if name.startswith("weight") else getattr(self, name)
        return given

    def flatten_parameters(self: Any) -> None:
        """Lay out the parameters for cuDNN; codes have no need of it."""
        if not isinstance(self.weight_fake_quantizer, Decoder):
            nn.RNNBase.flatten_parameters(self)


class QuantizedRNN(Recurrent, nn.RNN):
    """nn.RNN."""


class QuantizedLSTM(Recurrent, nn.LSTM):
    """nn.LSTM."""


class QuantizedGRU(Recurrent, nn.GRU):
    """nn.GRU."""
