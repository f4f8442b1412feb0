"""The optimizers that recurrent networks are trained with, as one fused step on a GPU.

Each class is a subclass of its namesake in :mod:`torch.optim`, with the same arguments, state and checkpoints, and
works with PyTorch's learning-rate schedulers and gradient scalers. On a GPU a step is one launch of a multi-tensor
Triton kernel, which reads and writes each number once and can be captured in a CUDA graph, whatever ``capturable`` says
(take a step before, so that the states exist); on a CPU it is the fastest of PyTorch's own. Where the options rule the
kernel out (complex numbers, float64, ``differentiable=True``, tensors as ``betas``, sharded parameters, an explicit
``foreach`` or ``fused``), the step is PyTorch's as well.

All of them take two more arguments, by name: ``max_norm`` clips the gradients to that norm within the step, over all
parameter groups at once, as :func:`rnnkernels.clip_grad_norm_` does before it, with the order ``norm_type``. On a GPU
the factor goes into the update itself and the gradients are not written again, so after the step ``.grad`` may hold
them clipped or not. The attribute ``grad_norm`` is the norm found in the last step, a tensor on the device, or None.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.optim import adagrad, adam, rmsprop, sgd

from rnnkernels import clip

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]

Parameters = Iterable[Tensor] | Iterable[dict] | Iterable[tuple[str, Tensor]]


class _Tensors:
    """The parameters of a group that have a gradient, with their gradients and states."""

    def __init__(self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]):
        self.params, self.grads, self.states, self.steps = params, grads, states, steps


class _Fused(torch.optim.Optimizer):
    """What the optimizers share: which implementation takes the step, the state, and clipping."""

    _counts_steps = True
    _rule: str

    max_norm: float | None
    norm_type: float
    grad_norm: Tensor | None

    def _set_clipping(self, max_norm: float | None, norm_type: float) -> None:
        if max_norm is not None:
            max_norm = clip._at_least_zero("max_norm", max_norm)
            if self.defaults.get("fused"):
                raise ValueError(
                    "fused: expected None together with max_norm, got True: a gradient scaler leaves PyTorch's fused "
                    "step to unscale the gradients, after they were clipped"
                )
        self.max_norm, self.norm_type, self.grad_norm = max_norm, float(norm_type), None

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "max_norm": self.max_norm, "norm_type": self.norm_type, "grad_norm": None}

    def step(self, closure: Callable[[], float] | None = None):
        """Update the parameters once.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again, gradients included, and returns the loss.

        Returns
        -------
        What ``closure`` returned; None without it.

        Raises
        ------
        RuntimeError
            If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            gathered = [(group, self._kernels(group)) for group in self.param_groups]
            gathered = [(group, kernels, self._gather(group, kernels)) for group, kernels in gathered]
            factor = None if self.max_norm is None else self._clip(gathered)
            for group, kernels, tensors in gathered:
                if not tensors.params:
                    continue
                if kernels is not None:
                    self._fused(kernels, group, tensors, factor)
                else:
                    self._plain(group, tensors)
                if not torch.compiler.is_compiling() and not group["differentiable"]:
                    # Neither the kernels nor PyTorch's fused steps for CPUs tell autograd what they wrote.
                    torch.autograd.graph.increment_version(tensors.params)
        return loss

    # ------------------------------------------------------------ which implementation

    def _kernels(self, group: dict):
        """The Triton kernels, if they are to take the group's step."""
        if not clip._may_use_kernels(group["params"]):
            return None
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return None
        lr = group["lr"]
        if (
            group["foreach"] is not None
            or group.get("fused") is not None
            or group["differentiable"]
            or any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
            or isinstance(group["weight_decay"], Tensor)
            or (isinstance(lr, Tensor) and (lr.requires_grad or lr.device not in (params[0].device, _CPU)))
        ):
            return None
        for param in params:
            self._check(param)
        return clip._kernels([*params, *(param.grad for param in params)])

    def _check(self, param: Tensor) -> None:
        if param.grad.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__}: expected dense gradients, got a sparse one ({param.grad.layout}) of shape "
                f"{tuple(param.grad.shape)}; torch.optim.SparseAdam takes those, or an Embedding with sparse=False"
            )

    # ------------------------------------------------------------ state

    def _buffers(self, group: dict) -> Sequence[str]:
        """The names of the states that a parameter has in this group, in the order of the kernel's."""
        raise NotImplementedError

    def _initial(self, param: Tensor, name: str) -> Tensor | None:
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def _gather(self, group: dict, kernels) -> _Tensors:
        """The group's tensors, their states made where there are none yet."""
        params = [param for param in group["params"] if param.grad is not None]
        tensors = _Tensors(params, [param.grad for param in params], [], [])
        for param, grad in zip(params, tensors.grads, strict=True):
            if grad.layout != torch.strided:
                self._check(param)
        names = self._buffers(group)
        if not names:
            return tensors
        states = [self.state[param] for param in params]
        for name in names:
            for param, state in zip(params, states, strict=True):
                if state.get(name) is None:
                    state[name] = self._initial(param, name)
            tensors.states.append([state[name] for state in states])
        if self._counts_steps:
            on_device = kernels is not None or group.get("capturable") or group.get("fused")
            for param, state in zip(params, states, strict=True):
                device = param.device if on_device else _CPU
                step = state.get("step")
                if step is None:
                    step = state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                elif on_device and (step.device != device or step.dtype != torch.float32):
                    step = state["step"] = step.to(device, torch.float32)
                tensors.steps.append(step)
        return tensors

    # ------------------------------------------------------------ the step

    def _clip(self, gathered) -> Tensor | None:
        """The factor for the kernels, where they take all groups; elsewhere the gradients are clipped in place."""
        grads = [grad for _, _, tensors in gathered for grad in tensors.grads]
        kernels = clip._kernels(grads) if self.norm_type in (1.0, 2.0, math.inf) else None
        if kernels is None or any(own is None and tensors.params for _, own, tensors in gathered):
            params = [param for _, _, tensors in gathered for param in tensors.params]
            self.grad_norm = clip.clip_grad_norm_(params, self.max_norm, self.norm_type)
            return None
        results = kernels.norm_and_factor(grads, self.max_norm, self.norm_type)
        self.grad_norm = results[0]
        return results[1]

    def _fused(self, kernels, group: dict, tensors: _Tensors, factor: Tensor | None) -> None:
        """The step by the Triton kernels."""
        for i, param in enumerate(tensors.params):
            column = (tensors.grads, *tensors.states)
            if all(role[i] is None or role[i].stride() == param.stride() for role in column):
                continue
            # The kernels go through memory: what is strided otherwise than its parameter is laid out anew.
            tensors.grads[i] = torch.empty_like(param).copy_(tensors.grads[i])
            for name, role in zip(self._buffers(group), tensors.states, strict=True):
                if role[i] is not None:
                    role[i] = self.state[param][name] = torch.empty_like(param).copy_(role[i])
        if tensors.steps:
            torch._foreach_add_(tensors.steps, 1)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cuda":
            lr = lr.item()  # no synchronization: the host has it
        shared = {"lr": lr, "factor": factor, "weight_decay": group["weight_decay"], "maximize": group["maximize"]}
        self._launch(kernels, group, tensors, shared)

    def _launch(self, kernels, group: dict, tensors: _Tensors, shared: dict) -> None:
        steps = tensors.steps if self._rule in ("adagrad", "adam") else None
        kernels.step(self._rule, tensors.params, tensors.grads, tensors.states, steps, **shared, **self._own(group))

    def _own(self, group: dict) -> dict:
        """What the kernel takes besides the arguments that all rules share."""
        raise NotImplementedError

    def _plain(self, group: dict, tensors: _Tensors) -> None:
        """The step by PyTorch's function."""
        raise NotImplementedError

    def _choice(self, group: dict, tensors: _Tensors) -> dict:
        """``foreach`` and ``fused`` for PyTorch's function, and what its fused step needs of a gradient scaler."""
        fused, foreach = group["fused"], group["foreach"]
        scaler = {"grad_scale": getattr(self, "grad_scale", None), "found_inf": getattr(self, "found_inf", None)}
        if fused is None and foreach is None and self._fits_fused(group, tensors):
            fused = True
        return {"foreach": foreach, "fused": fused, **scaler}

    def _plain_on_cpu(self, group: dict, tensors: _Tensors) -> bool:
        """Whether PyTorch's faster implementations for CPUs, which it does not choose by itself, may take the step."""
        if torch.compiler.is_compiling() or group["differentiable"] or tensors.params[0].device != _CPU:
            return False
        numbers = (group["lr"], group["weight_decay"], *group.get("betas", ()))
        return clip._PLAIN.issuperset(map(type, tensors.params)) and not any(isinstance(n, Tensor) for n in numbers)

    def _fits_fused(self, group: dict, tensors: _Tensors) -> bool:
        """Whether PyTorch's fused step for CPUs, the fastest, takes these tensors."""
        if not self._plain_on_cpu(group, tensors):
            return False
        places = {(tensor.device, tensor.dtype) for tensor in chain(tensors.params, tensors.grads)}
        counted = {step.dtype for step in tensors.steps} <= {torch.float32}
        # In 16 bit the fused step of SGD goes wrong with Nesterov's momentum (PyTorch 2.13).
        if len(places) != 1 or not counted or tensors.params[0].dtype not in (torch.float32, torch.float64):
            return False
        every = chain(tensors.params, tensors.grads, *tensors.states)
        return all(tensor is None or tensor.is_contiguous() for tensor in every)


_CPU = torch.device("cpu")


class SGD(_Fused, torch.optim.SGD):
    r"""Gradient descent, with momentum, Nesterov's momentum and weight decay.

    With $g_t$ the gradient at $\theta_{t-1}$, plus $\lambda\theta_{t-1}$ for the weight decay $\lambda$,

    .. math::

        b_t = \mu b_{t-1} + (1 - \tau) g_t, \\
        \theta_t = \theta_{t-1} - \eta b_t,

    where $b_1 = g_1$. Nesterov's momentum steps along $g_t + \mu b_t$ instead of $b_t$. Without momentum,
    $\theta_t = \theta_{t-1} - \eta g_t$. Whether the descent is called batch, mini-batch or stochastic depends on the
    data that $g_t$ was taken over, not on this class.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dicts
        Parameters, or parameter groups with options of their own.
    lr : float or Tensor, default 1e-3
        $\eta$. A tensor of one element on the parameters' GPU is read there at each step.
    momentum : float, default 0
        $\mu$.
    dampening : float, default 0
        $\tau$.
    weight_decay : float, default 0
        $\lambda$.
    nesterov : bool, default False
        Take Nesterov's momentum; needs ``momentum`` and no ``dampening``.
    maximize : bool, default False
        Ascend.
    foreach, fused : bool, optional
        Ask for one of PyTorch's implementations. By default the fastest.
    differentiable : bool, default False
        Let autograd run through the step.
    max_norm : float, optional
        Clip the gradients to this norm within the step; see :mod:`rnnkernels.optim`.
    norm_type : float, default 2.0
        The order of that norm.

    Raises
    ------
    ValueError
        If an option is out of its range.
    RuntimeError
        By ``step``, if a gradient is sparse.

    References
    ----------
    Robbins and Monro, "A stochastic approximation method", Annals of Mathematical Statistics 22 (1951). Polyak, "Some
    methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and Mathematical
    Physics 4 (1964). Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013, section 2.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> rk.optim.SGD([weight], lr=0.1, max_norm=1.0).step()
    >>> weight.data
    tensor([0.9400, 1.9200])
    """

    _counts_steps = False
    _rule = "sgd"

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        torch.optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_clipping(max_norm, norm_type)

    def _buffers(self, group):
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _initial(self, param, name):
        return None  # the first gradient, which the first step puts there

    def _launch(self, kernels, group, tensors, shared):
        momentum, dampening = group["momentum"], group["dampening"]
        if momentum == 0:
            kernels.step("sgd", tensors.params, tensors.grads, (), None, **shared)
            return
        (buffers,) = tensors.states
        fresh = [i for i, buffer in enumerate(buffers) if buffer is None]
        for i in fresh:
            param = tensors.params[i]
            buffers[i] = self.state[param]["momentum_buffer"] = torch.empty_like(param)
        for first in (False, True):
            chosen = [i for i in range(len(buffers)) if (i in set(fresh)) == first]
            if chosen:
                kernels.step(
                    "sgd",
                    [tensors.params[i] for i in chosen],
                    [tensors.grads[i] for i in chosen],
                    [[buffers[i] for i in chosen]],
                    None,
                    first=first,
                    nesterov=group["nesterov"],
                    momentum=momentum,
                    dampening=dampening,
                    **shared,
                )

    def _plain(self, group, tensors):
        if not tensors.states and group["foreach"] is group["fused"] is None and self._plain_on_cpu(group, tensors):
            # So little is to be done that PyTorch's preparations would take as long.
            params, grads, decay = tensors.params, tensors.grads, group["weight_decay"]
            if decay != 0:
                grads = torch._foreach_add(grads, params, alpha=-decay if group["maximize"] else decay)
            torch._foreach_add_(params, grads, alpha=group["lr"] if group["maximize"] else -group["lr"])
            return
        buffers = tensors.states[0] if tensors.states else []
        choice = self._choice(group, tensors)
        if choice["fused"] and any(b is None for b in buffers) and not all(b is None for b in buffers):
            choice["fused"] = group["fused"]  # it takes all first steps or none
        names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        options = {name: group[name] for name in names}
        sgd.sgd(tensors.params, tensors.grads, buffers, **choice, **options)
        for param, buffer in zip(tensors.params, buffers, strict=bool(buffers)):
            self.state[param]["momentum_buffer"] = buffer


class Adagrad(_Fused, torch.optim.Adagrad):
    r"""Gradient descent with a step for each parameter that shrinks as its gradients add up.

    With $g_t$ the gradient at $\theta_{t-1}$, plus $\lambda\theta_{t-1}$ for the weight decay $\lambda$,

    .. math::

        s_t = s_{t-1} + g_t^2, \\
        \theta_t = \theta_{t-1} - \frac{\eta}{1 + (t-1)\,\rho} \cdot \frac{g_t}{\sqrt{s_t} + \epsilon}.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dicts
        Parameters, or parameter groups with options of their own.
    lr : float or Tensor, default 1e-2
        $\eta$. A tensor of one element on the parameters' GPU is read there at each step.
    lr_decay : float, default 0
        $\rho$.
    weight_decay : float, default 0
        $\lambda$.
    initial_accumulator_value : float, default 0
        $s_0$.
    eps : float, default 1e-10
        $\epsilon$.
    foreach, fused : bool, optional
        Ask for one of PyTorch's implementations. By default the fastest.
    maximize : bool, default False
        Ascend.
    differentiable : bool, default False
        Let autograd run through the step.
    max_norm : float, optional
        Clip the gradients to this norm within the step; see :mod:`rnnkernels.optim`.
    norm_type : float, default 2.0
        The order of that norm.

    Raises
    ------
    ValueError
        If an option is out of its range.
    RuntimeError
        By ``step``, if a gradient is sparse. (PyTorch's own Adagrad takes those.)

    References
    ----------
    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization", Journal of
    Machine Learning Research 12 (2011), figure 1 with diagonal matrices.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([3.0, -0.04])
    >>> rk.optim.Adagrad([weight], lr=0.1).step()
    >>> weight.data
    tensor([0.9000, 2.1000])
    """

    _rule = "adagrad"

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        torch.optim.Adagrad.__init__(
            self,
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_clipping(max_norm, norm_type)

    def _buffers(self, group):
        return ("sum",)

    def _initial(self, param, name):
        value = self.defaults["initial_accumulator_value"]
        value = complex(value, value) if param.is_complex() else value
        return torch.full_like(param, value, memory_format=torch.preserve_format)

    def _own(self, group):
        return {"eps": group["eps"], "lr_decay": group["lr_decay"]}

    def _plain(self, group, tensors):
        names = ("lr", "weight_decay", "lr_decay", "eps", "maximize", "differentiable")
        adagrad.adagrad(
            tensors.params,
            tensors.grads,
            *tensors.states,
            tensors.steps,
            has_complex=any(param.is_complex() for param in tensors.params),
            **self._choice(group, tensors),
            **{name: group[name] for name in names},
        )


class RMSprop(_Fused, torch.optim.RMSprop):
    r"""Gradient descent with a step for each parameter, divided by the running size of its gradients.

    With $g_t$ the gradient at $\theta_{t-1}$, plus $\lambda\theta_{t-1}$ for the weight decay $\lambda$,

    .. math::

        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \\
        \theta_t = \theta_{t-1} - \eta \frac{g_t}{\sqrt{v_t} + \epsilon}.

    ``centered`` divides by the root of the running variance, $v_t - m_t^2$ with
    $m_t = \alpha m_{t-1} + (1 - \alpha) g_t$. With momentum $\mu$ the step is along
    $b_t = \mu b_{t-1} + g_t / (\sqrt{v_t} + \epsilon)$.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dicts
        Parameters, or parameter groups with options of their own.
    lr : float or Tensor, default 1e-2
        $\eta$. A tensor of one element on the parameters' GPU is read there at each step.
    alpha : float, default 0.99
        $\alpha$.
    eps : float, default 1e-8
        $\epsilon$.
    weight_decay : float, default 0
        $\lambda$.
    momentum : float, default 0
        $\mu$.
    centered : bool, default False
        Divide by the standard deviation.
    capturable : bool, default False
        Whether PyTorch's implementation can be captured in a CUDA graph; the Triton kernels always can.
    foreach : bool, optional
        Ask for one of PyTorch's implementations. By default the fastest.
    maximize : bool, default False
        Ascend.
    differentiable : bool, default False
        Let autograd run through the step.
    max_norm : float, optional
        Clip the gradients to this norm within the step; see :mod:`rnnkernels.optim`.
    norm_type : float, default 2.0
        The order of that norm.

    Raises
    ------
    ValueError
        If an option is out of its range.
    RuntimeError
        By ``step``, if a gradient is sparse.

    References
    ----------
    Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural Networks for Machine Learning, 2012. Graves, "Generating
    sequences with recurrent neural networks", 2013, equations 38 to 45, for the centered form.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([3.0, -0.04])
    >>> rk.optim.RMSprop([weight], lr=0.01).step()
    >>> weight.data
    tensor([0.9000, 2.1000])
    """

    _rule = "rmsprop"

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        torch.optim.RMSprop.__init__(
            self,
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._set_clipping(max_norm, norm_type)

    def _buffers(self, group):
        optional = {"grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        return ("square_avg", *(name for name, wanted in optional.items() if wanted))

    def _own(self, group):
        names = ("eps", "momentum", "centered")
        return {**{name: group[name] for name in names}, "betas": (0.0, group["alpha"])}

    def _plain(self, group, tensors):
        columns = dict(zip(self._buffers(group), tensors.states, strict=True))
        foreach = group["foreach"]
        if foreach is None and self._plain_on_cpu(group, tensors):
            foreach = True
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize", "differentiable")
        rmsprop.rmsprop(
            tensors.params,
            tensors.grads,
            columns["square_avg"],
            columns.get("grad_avg", []),
            columns.get("momentum_buffer", []),
            tensors.steps,
            capturable=group["capturable"],
            foreach=foreach,
            has_complex=any(param.is_complex() for param in tensors.params),
            **{name: group[name] for name in names},
        )


class Adam(_Fused, torch.optim.Adam):
    r"""Momentum and a step for each parameter, both corrected for their start at zero.

    With $g_t$ the gradient at $\theta_{t-1}$, plus $\lambda\theta_{t-1}$ for the weight decay $\lambda$,

    .. math::

        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \\
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        \theta_t = \theta_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}.

    AMSGrad takes the largest $v_s$ for $s \le t$ in place of $v_t$.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dicts
        Parameters, or parameter groups with options of their own.
    lr : float or Tensor, default 1e-3
        $\eta$. A tensor of one element on the parameters' GPU is read there at each step.
    betas : pair of float, default (0.9, 0.999)
        $\beta_1$ and $\beta_2$.
    eps : float, default 1e-8
        $\epsilon$.
    weight_decay : float, default 0
        $\lambda$. It passes through the division; :class:`AdamW` decays the weights themselves.
    amsgrad : bool, default False
        Take AMSGrad.
    foreach, fused : bool, optional
        Ask for one of PyTorch's implementations. By default the fastest.
    maximize : bool, default False
        Ascend.
    capturable : bool, default False
        Whether PyTorch's implementation can be captured in a CUDA graph; the Triton kernels always can.
    differentiable : bool, default False
        Let autograd run through the step.
    decoupled_weight_decay : bool, default False
        Decay the weights as :class:`AdamW` does.
    max_norm : float, optional
        Clip the gradients to this norm within the step; see :mod:`rnnkernels.optim`.
    norm_type : float, default 2.0
        The order of that norm.

    Raises
    ------
    ValueError
        If an option is out of its range.
    RuntimeError
        By ``step``, if a gradient is sparse.

    References
    ----------
    Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1. Reddi, Kale and Kumar, "On the
    convergence of Adam and beyond", ICLR 2018, algorithm 2.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([3.0, -0.04])
    >>> rk.optim.Adam([weight], lr=0.1).step()
    >>> weight.data
    tensor([0.9000, 2.1000])
    """

    _rule = "adam"

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._set_clipping(max_norm, norm_type)

    def _buffers(self, group):
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))

    def _own(self, group):
        return {"eps": group["eps"], "betas": group["betas"], "decoupled": group["decoupled_weight_decay"]}

    def _plain(self, group, tensors):
        mean, square, *largest = tensors.states
        beta1, beta2 = group["betas"]
        names = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "capturable", "differentiable")
        adam.adam(
            tensors.params,
            tensors.grads,
            mean,
            square,
            largest[0] if largest else [],
            tensors.steps,
            beta1=beta1,
            beta2=beta2,
            has_complex=any(param.is_complex() for param in tensors.params),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            **self._choice(group, tensors),
            **{name: group[name] for name in names},
        )


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with weight decay that does not pass through the division.

    $m_t$ and $v_t$ are those of :class:`Adam`, from the gradient alone, and

    .. math::

        \bar\theta_t = (1 - \eta\lambda)\,\theta_{t-1}, \\
        \theta_t = \bar\theta_t - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dicts
        Parameters, or parameter groups with options of their own.
    lr : float or Tensor, default 1e-3
        $\eta$. A tensor of one element on the parameters' GPU is read there at each step.
    betas : pair of float, default (0.9, 0.999)
        $\beta_1$ and $\beta_2$.
    eps : float, default 1e-8
        $\epsilon$.
    weight_decay : float, default 1e-2
        $\lambda$.
    amsgrad : bool, default False
        Take AMSGrad.
    maximize : bool, default False
        Ascend.
    foreach, fused : bool, optional
        Ask for one of PyTorch's implementations. By default the fastest.
    capturable : bool, default False
        Whether PyTorch's implementation can be captured in a CUDA graph; the Triton kernels always can.
    differentiable : bool, default False
        Let autograd run through the step.
    max_norm : float, optional
        Clip the gradients to this norm within the step; see :mod:`rnnkernels.optim`.
    norm_type : float, default 2.0
        The order of that norm.

    Raises
    ------
    ValueError
        If an option is out of its range.
    RuntimeError
        By ``step``, if a gradient is sparse.

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.

    Examples
    --------
    >>> import torch, rnnkernels as rk
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([3.0, -0.04])
    >>> rk.optim.AdamW([weight], lr=0.1, weight_decay=0.5).step()
    >>> weight.data
    tensor([0.8500, 2.0000])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_norm=max_norm,
            norm_type=norm_type,
        )
