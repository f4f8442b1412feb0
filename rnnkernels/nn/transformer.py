"""A small decoder-only Transformer, to set beside recurrent networks."""

import torch
from torch import Tensor

from rnnkernels.ops._checks import check_choice, check_lengths, check_probability
from rnnkernels.ops.attention import native

POSITIONS = ("rotary", "learned", "none")


def rotate(input: Tensor, first: int = 0, base: float = 10000.0) -> Tensor:
    r"""Rotary positions: rotate each pair of features by an angle that grows with the position.

    .. math:: (x_{2i}, x_{2i+1}) \mapsto R(t \, \theta_i) \, (x_{2i}, x_{2i+1}), \qquad \theta_i = b^{-2i/d}

    where $R$ is the rotation of the plane: products of rotated queries and keys depend on the distance alone.

    Parameters
    ----------
    input : Tensor, shape (..., sequence_length, head_dim)
        Queries or keys; ``head_dim`` is even.
    first : int
        Position $t$ of the first step. Default: 0.
    base : float
        $b$. Default: 10000.

    Returns
    -------
    Tensor, shape of ``input``

    References
    ----------
    Su et al., "RoFormer: enhanced Transformer with rotary position embedding", Neurocomputing 568 (2024),
    arXiv:2104.09864, section 3.2.

    Examples
    --------
    >>> query, key = torch.randn(2, 1, 8).unbind(0)
    >>> near = (rotate(query, 3) * rotate(key, 1)).sum()
    >>> far = (rotate(query, 103) * rotate(key, 101)).sum()
    >>> torch.allclose(near, far, atol=1e-4)
    True
    """
    length, size = input.shape[-2:]
    # Angles of late positions need more digits than 16 bits have.
    wide = torch.promote_types(input.dtype, torch.float32)
    position = torch.arange(first, first + length, device=input.device, dtype=wide)
    angle = position.unsqueeze(1) * base ** (-torch.arange(0, size, 2, device=input.device, dtype=wide) / size)
    cosine, sine = angle.cos(), angle.sin()
    even, odd = input[..., 0::2].to(wide), input[..., 1::2].to(wide)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).to(input.dtype)


class KeyValueCache:
    """Keys and values of all steps so far: what a :class:`Transformer` has for a state, growing with each step.

    A call of the Transformer with a cache extends it in place. To go on from one past in several ways, copy it first:
    ``copy.deepcopy(cache)``.

    Attributes
    ----------
    length : int
        Steps in it.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stored: list[list[Tensor]] = []

    def extend(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Append keys and values of shape (batch, heads, steps, head_dim), and return those of all steps."""
        if layer == len(self._stored):
            self._stored.append(list(new))
            return list(new)
        total = self.length + new[0].shape[2]
        stored = self._stored[layer]
        for i, tensor in enumerate(new):
            past = stored[i]
            if torch.is_grad_enabled():
                stored[i] = torch.cat([past[:, :, : self.length], tensor], 2)
                continue
            if past.shape[2] < total:  # twice as much as is needed, so that few steps copy
                stored[i] = past.new_empty(*past.shape[:2], 2 * total, past.shape[3])
                stored[i][:, :, : self.length] = past[:, :, : self.length]
            stored[i][:, :, self.length : total] = tensor
        return [tensor[:, :, :total] for tensor in stored]

    def bytes(self) -> int:
        """Memory that the steps so far take, not counting what is reserved for the next."""
        return sum(t[:, :, : self.length].numel() * t.element_size() for pair in self._stored for t in pair)


class _Layer(torch.nn.TransformerEncoderLayer):
    """PyTorch's layer for its parameters, its own forward pass."""

    def forward(self, input: Tensor, cache: KeyValueCache, index: int, rotary: bool) -> Tensor:
        """One layer over (batch, sequence, feature)."""
        input = input + self.dropout1(self._attend(self.norm1(input), cache, index, rotary))
        inner = self.linear2(self.dropout(self.activation(self.linear1(self.norm2(input)))))
        return input + self.dropout2(inner)

    def _attend(self, input: Tensor, cache: KeyValueCache, index: int, rotary: bool) -> Tensor:
        parameters = self.self_attn
        projected = torch.nn.functional.linear(input, parameters.in_proj_weight, parameters.in_proj_bias)
        # (batch, sequence, feature) to (batch, heads, sequence, head_dim), three times.
        query, key, value = projected.unflatten(-1, (3, parameters.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rotary:
            query, key = rotate(query, cache.length), rotate(key, cache.length)
        key, value = cache.extend(index, key, value)
        output = native(query, key, value, dropout=parameters.dropout if self.training else 0.0)
        return parameters.out_proj(output.transpose(1, 2).flatten(-2))


class Transformer(torch.nn.Module):
    r"""Decoder-only Transformer: layers of causal self-attention and of a feed-forward network.

    .. math::
        u &= x + \operatorname{Attention}(\operatorname{LN}(x)) \\
        y &= u + W_2 \operatorname{GELU}(W_1 \operatorname{LN}(u))

    in each layer, with a last layer normalization after all of them. A step sees itself and all steps before it. The
    call is that of a recurrent module: what comes back beside the output is the state to go on from, here a
    :class:`KeyValueCache` that grows with each step.

    Parameters
    ----------
    d_model : int
        Features of the input and of the output.
    nhead : int
        Heads; divides ``d_model``.
    num_layers : int
        Layers. Default: 1.
    dim_feedforward : int, optional
        Features inside of the feed-forward network. Default: 4 * d_model.
    dropout : float
        Probability of zeroing a weight of attention, an element inside of the feed-forward network, and one of either's
        output, in training. Default: 0.
    bias : bool
        Whether linear layers and normalizations have biases. Default: True.
    batch_first : bool
        Input and output as (batch, sequence, feature) rather than (sequence, batch, feature). Default: False.
    device, dtype
        Where and in which type to make the parameters.
    positions : {"rotary", "learned", "none"}
        How a step knows when it is: by a rotation of queries and keys, so that distance counts, by a learned vector
        added to the input, or not at all. Default: ``"rotary"``.
    max_length : int, optional
        Most steps, cached ones included. Needed for learned positions, and for those alone.

    Attributes
    ----------
    layers : Module
        As in ``torch.nn.TransformerEncoder`` with ``norm_first=True`` and GELU, and so is ``norm``: the ``state_dict``
        is the same but for positions, and so is the function with ``positions="none"`` and a causal mask.
    position : Tensor
        Learned positions, of shape (max_length, d_model).

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range.

    Notes
    -----
    Attention is PyTorch's :func:`~torch.nn.functional.scaled_dot_product_attention`; :func:`rnnkernels.ops.attention`
    is the kernel to read.

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017; decoder-only, with the normalization first: Radford et
    al., "Language models are unsupervised multitask learners" (2019), section 2.3.

    Examples
    --------
    >>> transformer = Transformer(16, nhead=4, num_layers=2).eval()
    >>> x = torch.randn(10, 3, 16)
    >>> with torch.no_grad():
    ...     output, _ = transformer(x)
    ...     first, cache = transformer(x[:9])
    ...     last, cache = transformer(x[9:], cache)
    >>> torch.allclose(torch.cat([first, last]), output, atol=1e-5), cache.length
    (True, 10)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int = 1,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        positions: str = "rotary",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        dim_feedforward = 4 * d_model if dim_feedforward is None else dim_feedforward
        sizes = {"d_model": d_model, "nhead": nhead, "num_layers": num_layers, "dim_feedforward": dim_feedforward}
        for name, value in {**sizes, **({} if max_length is None else {"max_length": max_length})}.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if d_model % nhead:
            raise ValueError(f"nhead: expected a divisor of d_model = {d_model}, got {nhead}")
        check_choice("positions", positions, POSITIONS)
        if positions == "rotary" and d_model // nhead % 2:
            raise ValueError(f"nhead: expected heads of an even size for rotary positions, got {d_model // nhead}")
        if (positions == "learned") != (max_length is not None):
            expected = "an int with learned positions" if positions == "learned" else f"None with {positions!r}"
            raise ValueError(f"max_length: expected {expected}, got {max_length}")
        self.d_model = d_model
        self.batch_first = batch_first
        self.positions = positions
        like = {"device": device, "dtype": dtype}
        arguments = d_model, nhead, dim_feedforward, check_probability("dropout", dropout), "gelu"
        options = {"norm_first": True, "bias": bias, "batch_first": True}
        self.layers = torch.nn.ModuleList(_Layer(*arguments, **options, **like) for _ in range(num_layers))
        self.norm = torch.nn.LayerNorm(d_model, bias=bias, **like)
        if positions == "learned":
            self.position = torch.nn.Parameter(torch.empty(max_length, d_model, **like))
            torch.nn.init.normal_(self.position, std=0.02)

    def forward(
        self, input: Tensor, cache: KeyValueCache | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Run the network over a sequence, or over what follows the sequence in ``cache``.

        Parameters
        ----------
        input : Tensor, shape (sequence_length, batch, d_model)
            (batch, sequence_length, d_model) with ``batch_first``.
        cache : KeyValueCache, optional
            Of the steps before. It is extended in place. Default: no steps before.
        lengths : Tensor of int64, shape (batch,), optional
            Steps of each sequence of a padded batch: the output is zero in the padding, which no other step sees. The
            cache keeps the padding, and does not serve to go on from. Default: all.

        Returns
        -------
        output : Tensor
            Shape and type of ``input``.
        cache : KeyValueCache
            Of all steps so far.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit, or there are more steps than learned positions.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
        if input.dim() != 3 or input.shape[2] != self.d_model or 0 in input.shape:
            order = "batch, sequence_length" if self.batch_first else "sequence_length, batch"
            raise ValueError(f"input: expected shape ({order}, {self.d_model}), got {tuple(input.shape)}")
        if cache is not None and not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache: expected a KeyValueCache, got {type(cache).__name__}")
        output = input if self.batch_first else input.transpose(0, 1)
        batch, steps, _ = output.shape
        if lengths is not None:
            lengths = check_lengths(lengths, steps, batch, input.device)
        cache = KeyValueCache() if cache is None else cache
        if self.positions == "learned":
            end = cache.length + steps
            if end > len(self.position):
                raise ValueError(f"input: expected at most max_length = {len(self.position)} steps in all, got {end}")
            output = output + self.position[cache.length : end]
        for index, layer in enumerate(self.layers):
            output = layer(output, cache, index, self.positions == "rotary")
        cache.length += steps
        output = self.norm(output)
        if lengths is not None:
            past_end = torch.arange(steps, device=input.device) >= lengths.unsqueeze(1)
            output = output.masked_fill(past_end.unsqueeze(-1), 0)
        return output if self.batch_first else output.transpose(0, 1), cache
