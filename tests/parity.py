"""Comparison of an operator with its specification: results and every gradient, under random cotangents."""

import torch

import rnnkernels as rk

NAMES = ("input", "h_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Tensors that the RNN and the GRU take, in this order."""

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Operators, and how many rows of the weights a hidden unit has."""

EXTRA_WEIGHTS = {
    "rnn": ("norm_hh",),
    "gru": ("norm_ih", "norm_hh"),
    "lstm": ("weight_peephole", "norm_ih", "norm_hh", "norm_cell_weight", "norm_cell_bias"),
}
"""Weights that options add, which an operator takes by keyword."""

RESULTS = ("output", "h_n", "c_n")

OF_THE_OPERATOR = {"recompute_gates"}
"""Options that change how an operator works, not what it computes: the reference has none."""


def names_of(operator):
    """Names of the tensors that an operator takes by position."""
    return NAMES if operator != "lstm" else (*NAMES[:2], "c_0", *NAMES[2:], "weight_hr")


def arguments(
    sequence_length,
    batch,
    input_size,
    hidden_size,
    dtype,
    device="cpu",
    bias=True,
    operator="rnn",
    state_size=None,
):
    """Random tensors for an operator, exact in ``dtype``, scaled so that the state neither dies nor explodes.

    With ``state_size``, the LSTM's projection to so many features comes last. Absent tensors are None, or left off the
    end.
    """
    rows, state = GATES[operator] * hidden_size, state_size or hidden_size
    shapes = {
        "input": (sequence_length, batch, input_size),
        "h_0": (batch, state),
        "c_0": (batch, hidden_size),
        "weight_ih": (rows, input_size),
        "weight_hh": (rows, state),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "weight_hr": (state, hidden_size),
    }
    tensors = []
    for name in names_of(operator):
        if (name == "weight_hr" and state_size is None) or (name.startswith("bias") and not bias):
            tensors.append(None)
            continue
        tensor = torch.randn(shapes[name], dtype=torch.float64)
        if name.startswith("weight"):
            tensor /= shapes[name][1] ** 0.5
        tensors.append(tensor.to(dtype=dtype, device=device).requires_grad_())
    while tensors[-1] is None:
        tensors.pop()
    return tensors


def extra_weights(operator, hidden_size, dtype, device="cpu", names=None):
    """Random weights of options by name; all that the operator has, or those in ``names``."""
    rows = GATES[operator] * hidden_size
    shapes = {name: (hidden_size,) if name.startswith("norm_cell") else (rows,) for name in EXTRA_WEIGHTS[operator]}
    weights = {}
    for name, shape in shapes.items():
        if names is not None and name not in names:
            continue
        weight = torch.randn((3, hidden_size) if name == "weight_peephole" else shape, dtype=torch.float64) / 2
        weight += name.startswith("norm") and not name.endswith("bias")
        weights[name] = weight.to(dtype=dtype, device=device).requires_grad_()
    return weights


def random_lengths(batch, sequence_length, order="unsorted"):
    """Lengths of 1 to ``sequence_length`` for a batch: the longest somewhere, in descending order or in none."""
    lengths = torch.randint(1, sequence_length + 1, (batch,))
    lengths[batch // 2] = sequence_length
    return lengths.sort(descending=True).values if order == "sorted" else lengths


def drawn(operator, sequence_length, batch, hidden_size, dtype, device, options):
    """Random tensors for an operator and for its options, which name what they ask for."""
    options = dict(options)
    sizes = {name: options.pop(name) for name in ("bias", "state_size") if name in options}
    tensors = arguments(sequence_length, batch, 3, hidden_size, dtype, device, operator=operator, **sizes)
    wanted = [name for name in options if name.startswith(("norm", "weight"))]
    if "norm_hh" in wanted and operator != "rnn":
        wanted.append("norm_ih")
    options |= extra_weights(operator, hidden_size, dtype, device, wanted)
    if options.get("lengths"):
        options["lengths"] = random_lengths(batch, sequence_length).to(device)
    if options.get("reset"):
        options["reset"] = (torch.rand(sequence_length, batch) < 0.3).to(device)
    # A bound that nothing reaches: what the plain kernels could do as well runs on the general ones.
    options.setdefault("grad_clip", 1e30)
    return tensors, options


def leaves_of(operator, tensors, options):
    """What an operator can be differentiated in, by name: its tensors, and the weights among its options."""
    positional = dict(zip(names_of(operator), tensors, strict=False))
    named = {name: value for name, value in options.items() if name in EXTRA_WEIGHTS[operator]}
    return {name: value for name, value in {**positional, **named}.items() if value is not None}


def outcome(function, operator, tensors, cotangents, **options):
    """The results of ``function`` and the gradients of all its tensors, by name."""
    results = function(*tensors, **options)
    leaves = leaves_of(operator, tensors, options)
    gradients = torch.autograd.grad(results, tuple(leaves.values()), cotangents)
    return {
        **dict(zip(RESULTS, (result.detach() for result in results), strict=False)),
        **dict(zip((f"grad {name}" for name in leaves), gradients, strict=True)),
    }


def relative_error(value, expected):
    """The largest error of an element, relative to the largest element."""
    if value.numel() == 0:
        return 0.0
    return float((value.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def exact(value):
    """A leaf in float64 with the value of a tensor of floats; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_()
    return value


def assert_parity(tensors, tolerance, operator="rnn", **options):
    """Hold an operator to the reference in float64.

    ``tensors`` are what the operator takes by position, ``options`` what it takes by keyword, weights among them.
    ``tolerance`` bounds the relative error of each result and gradient. Where sums cancel, the textbook loop itself
    errs in the tensors' type, and four times its error is allowed on top.
    """
    reference = getattr(rk.reference, operator)
    dtype = tensors[0].dtype
    equations = {name: value for name, value in options.items() if name not in OF_THE_OPERATOR}
    doubles, double_options = [exact(tensor) for tensor in tensors], {k: exact(v) for k, v in equations.items()}
    with torch.no_grad():
        cotangents = [torch.randn_like(result).to(dtype) for result in reference(*doubles, **double_options)]
    double_cotangents = [cotangent.double() for cotangent in cotangents]
    expected = outcome(reference, operator, doubles, double_cotangents, **double_options)
    textbook = outcome(reference, operator, tensors, cotangents, **equations)
    actual = outcome(getattr(rk.ops, operator), operator, tensors, cotangents, **options)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == dtype, name
        assert value.shape == expected[name].shape, name
        error = relative_error(value, expected[name])
        bound = tolerance + 4 * relative_error(textbook[name], expected[name])
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"


def assert_repeatable(operator, tensors, **options):
    """Hold an operator to the same bits the second time, and to leaving its arguments and cotangents alone."""
    before = [tensor.detach().clone() for tensor in tensors]
    runs = []
    for _ in range(2):
        results = getattr(rk.ops, operator)(*tensors, **options)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(result) for result in results]
        kept = [cotangent.clone() for cotangent in cotangents]
        runs.append((*results, *torch.autograd.grad(results, tensors, cotangents)))
        assert all(map(torch.equal, cotangents, kept))
    assert all(map(torch.equal, *runs))
    assert all(map(torch.equal, tensors, before))


def assert_padding_goes_nowhere(operator, tensors, large=1e6, **options):
    """Hold an operator to the same bits whatever stands behind the end of a sequence, NaN as well."""
    function, lengths = getattr(rk.ops, operator), torch.tensor([4, 6, 1], device=tensors[0].device)
    results = function(*tensors, lengths=lengths, **options)
    cotangents = [torch.randn_like(result) for result in results]
    expected = [*results, *torch.autograd.grad(results, tensors, cotangents)]
    for value in (large, float("nan")):
        input = tensors[0].detach().clone()
        for b, length in enumerate(lengths.tolist()):
            cotangents[0][length:, b] = float("nan")
            input[length:, b] = value
        others = [input.requires_grad_(), *tensors[1:]]
        results = function(*others, lengths=lengths, **options)
        for a, b in zip((*results, *torch.autograd.grad(results, others, cotangents)), expected, strict=True):
            assert torch.equal(a, b)
