"""What AdamWEMA takes and refuses, and what it keeps from step to step."""

import copy
import gc
import inspect
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from networks import give_gradients, parameters
from torch import nn

from seqjepa.kernels import adamw_step
from seqjepa.kernels.adamw_ema import AdamWEMA
from seqjepa.kernels.adamw_step import adamw_ema_reference
from seqjepa.kernels.internal import multi_tensor
from seqjepa.kernels.internal.backend import INTERPRETED

triton = pytest.mark.triton


@triton
def test_own_teachers_and_state(device):
    """Without teachers of yours it makes its own, saves them, and loads them into place."""
    ours = parameters(device)
    optimizer = AdamWEMA(ours, lr=1e-2, ema_decay=0.5)
    for step in range(2):
        give_gradients(ours, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "ema"}

    again = [nn.Parameter(p.detach().clone()) for p in ours]
    other = AdamWEMA(again, lr=1.0, ema_decay=0.0)
    other.load_state_dict(saved)
    for params, one in ((ours, optimizer), (again, other)):
        give_gradients(params, 2)
        one.step()
    for p, q in zip(ours, again, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.teacher_of(p), other.teacher_of(q))
        assert not torch.equal(p, optimizer.teacher_of(p))


@triton
def test_states_go_to_and_from_torch(device):
    ours, theirs = parameters(device), parameters(device)
    optimizer = AdamWEMA(ours, lr=1e-2, teacher=[])
    torchs = torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for step in range(4):
        if step == 2:  # half-way they swap their states
            mine, its = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(torchs.state_dict())
            optimizer.load_state_dict(its)
            torchs.load_state_dict(mine)
        for params, one in ((ours, optimizer), (theirs, torchs)):
            give_gradients(params, step)
            one.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@triton
def test_the_numbers_of_a_group_may_change(device):
    """Each step takes those that stand there, of whatever kind they are."""
    kinds = (float, np.float32, np.float64, np.array, torch.tensor)
    ours, exact = parameters(device), [p.detach().double() for p in parameters(device)]
    moments = [(0.0, 0.0) for _ in exact]
    optimizer = AdamWEMA(ours, teacher=[])
    for step, kind in enumerate(kinds):
        settings = {"lr": 0.01 * (step + 1), "eps": 0.1 / (step + 1), "weight_decay": 0.25 * step}
        optimizer.param_groups[0].update({name: kind(value) for name, value in settings.items()})
        optimizer.param_groups[0]["betas"] = np.array([0.5 + 0.05 * step, 0.75])
        give_gradients(ours, step)
        for number, p in enumerate(ours):  # moments that forget at other rates than their corrections say
            exact[number], *moments[number], _ = adamw_ema_reference(
                exact[number], p.grad.double(), *moments[number], step + 1, exact[number],
                beta1=0.5 + 0.05 * step, beta2=0.75, ema_decay=1.0, **settings,
            )  # fmt: skip
        optimizer.step()
    for p, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-5)


def test_arguments_are_those_of_torch():
    """In its order, by its names, with its defaults; its `fused` has none, and is what all of this is."""
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(AdamWEMA).parameters
    for mine, its in zip(ours.values(), theirs.values(), strict=False):
        assert (mine.name, mine.kind) == (its.name, its.kind)
        assert mine.default == its.default or mine.name == "fused"
    assert list(ours)[len(theirs) :] == ["ema_decay", "teacher"]
    explicit = {"maximize": False, "foreach": None, "differentiable": False}
    for given in ({"capturable": True, "fused": True}, {"capturable": False, "fused": None}, {"foreach": False}):
        p = nn.Parameter(torch.zeros(3))
        optimizer = AdamWEMA([p], 0.5, (0.9, 0.99), 0.0, 0.0, False, **(explicit | given))
        p.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), -0.5))
        theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(3))], fused=True)
        theirs.load_state_dict(optimizer.state_dict())
        assert theirs.param_groups[0]["fused"] is True


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "foreach", "differentiable"])
def test_options_are_refused_wherever_they_are_written(option):
    """As an argument, in a group, in a group added later, and written into a group; nothing moves then."""
    message = f"{option}=True, which AdamWEMA does not support"
    p, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        AdamWEMA([p], **{option: True})
    with pytest.raises(ValueError, match=message):
        AdamWEMA([{"params": [p], option: True}])
    optimizer = AdamWEMA([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], option: True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other]})
    optimizer.param_groups[1][option] = True
    p.grad, other.grad = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state
    optimizer.param_groups[1][option] = False
    optimizer.step()
    assert (p < 1).all()


@pytest.mark.parametrize("where", ["argument", "group", "added group"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"lr": torch.tensor(-1.0)}, "lr must be at least 0, got -1.0"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"eps": math.nan}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"lr": 1j}, "lr must be a number, got 1j"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"weight_decay": np.array(-0.5)}, "weight_decay must be at least 0, got -0.5"),
        ({"betas": (0.9, "a")}, "betas must be a number, got 'a'"),
        ({"betas": np.array([0.9, 1.0])}, r"betas must be in \[0, 1\)"),
        ({"betas": (1.5, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"ema_decay": "x"}, "ema_decay must be a number, got 'x'"),
        ({"ema_decay": np.array(1.1)}, r"ema_decay must be in \[0, 1\], got 1.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"betas": (math.nan, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9,)}, "one for each moment, got"),
        ({"betas": (0.9, 0.99, 0.999)}, "one for each moment, got"),
        ({"betas": 0.9}, "one for each moment, got 0.9"),
        ({"ema_decay": 1.1}, r"ema_decay must be in \[0, 1\], got 1.1"),
        ({"ema_decay": math.nan}, r"ema_decay must be in \[0, 1\], got nan"),
        ({"ema_decay": torch.tensor(1.5)}, r"ema_decay must be in \[0, 1\], got 1.5"),
        ({"ema_decay": torch.full((1,), 0.5)}, "ema_decay must be a (floating 0-dim tensor|number)"),
        ({"fused": False}, "fused must be True: otherwise use"),
    ],
)
def test_refusals(settings, message, where):
    group = {"params": [nn.Parameter(torch.zeros(2))], **settings}
    give = {
        "argument": lambda: AdamWEMA(**group),
        "group": lambda: AdamWEMA([group]),
        "added group": lambda: AdamWEMA([nn.Parameter(torch.zeros(2))]).add_param_group(group),
    }[where]
    with pytest.raises(ValueError, match=message):
        give()
    p = group["params"][0]
    optimizer = AdamWEMA([p])
    p.grad = torch.ones(2)
    optimizer.param_groups[0].update(settings)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (p == 0).all()
    assert not optimizer.state


def test_other_keys_of_a_group_are_left_alone():
    """As torch's optimisers leave them: names, and what a scheduler notes."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = AdamWEMA([{"params": [p], "name": "head", "lr_scale": 0.5}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    p.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    group = optimizer.param_groups[0]
    assert (group["name"], group["lr_scale"], group["initial_lr"]) == ("head", 0.5, 1e-3)


def test_loads_the_default_adamw_and_refuses_what_it_is_not(device):
    """Its step counts lie on the CPU wherever its parameters are."""
    ours, theirs = parameters(device), parameters(device)
    torchs = torch.optim.AdamW(theirs, lr=1e-2)
    give_gradients(theirs, 0)
    torchs.step()
    rate = torch.tensor(1.0, device=device)
    optimizer = AdamWEMA(ours, lr=rate, teacher=[])
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert optimizer.state[ours[0]]["step"].device == ours[0].device
    assert optimizer.param_groups[0]["lr"] is rate  # a schedule may write on it still
    assert rate == torch.tensor(1e-2)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    for params, one in ((ours, optimizer), (theirs, torchs)):
        give_gradients(params, 1)
        one.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for option in ("amsgrad", "maximize"):
        state = torch.optim.AdamW(parameters(device), **{option: True}).state_dict()
        with pytest.raises(ValueError, match=f"{option}=True, which AdamWEMA does not support"):
            optimizer.load_state_dict(state)


def test_copies_and_pickles():
    ours = parameters("cpu")
    optimizer = AdamWEMA(ours, ema_decay=0.5, teacher=[(ours[0], torch.zeros(1))])
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        params = other.param_groups[0]["params"]
        assert torch.equal(other.teacher_of(params[0]), torch.zeros(1))
        give_gradients(params, 0)
        other.step()
        assert other.teacher_of(params[0]) != 0
    assert optimizer.teacher_of(ours[0]) == 0


LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (LINEAR.parameters, "teacher must hold pairs .* got Parameter"),
        (lambda: [LINEAR.weight.detach()], "teacher must hold pairs .* got Tensor"),  # two rows, no pair
        (LINEAR.named_parameters, "teacher must hold pairs .* got tuple"),
        (lambda: [(LINEAR.weight,)], "teacher must hold pairs .* got tuple"),
        (lambda: [1], "teacher must hold pairs .* got int"),
        (lambda: LINEAR, "teacher must hold pairs .* got Linear"),
        (lambda: [(torch.zeros(2), torch.zeros(2))], "1 of 1 teachers follow parameters that are not in params"),
        (lambda: [(LINEAR.bias, torch.zeros(3))], r"a teacher is torch.float32 \[3\] on cpu, its parameter .* \[2\]"),
        (lambda: [(LINEAR.bias, torch.zeros(2, dtype=torch.int32))], "a teacher is torch.int32"),
        (lambda: [(LINEAR.bias, torch.zeros(2).to(torch.float8_e5m2))], "a teacher is torch.float8_e5m2"),
        (lambda: [(LINEAR.bias, torch.zeros(2, device="meta"))], r"a teacher is torch.float32 \[2\] on meta"),
        (lambda: [(LINEAR.bias, LINEAR.bias)], "a teacher shares memory with another tensor of shape"),
        (lambda: [(LINEAR.bias, LINEAR.bias.detach())], "a teacher shares memory with another tensor"),
        (lambda: [(LINEAR.bias, LINEAR.weight.detach()[0])], "a teacher shares memory with another tensor"),
        (lambda: zip(LINEAR.parameters(), LINEAR.parameters(), strict=True), "a teacher shares memory with another"),
        (lambda: [(LINEAR.bias, torch.zeros(1).expand(2))], r"of shape \[2\] is expanded, its elements share memory"),
        (lambda: iter([]), "teacher is an iterator that yields nothing: was it read before"),
        (lambda: [(LINEAR.bias, torch.zeros(2))] * 2, r"a parameter of shape \[2\] has two teachers"),
    ],
)
def test_refuses_teachers_that_do_not_fit(teacher, message):
    with pytest.raises(ValueError, match=message):
        AdamWEMA(LINEAR.parameters(), teacher=teacher())


def test_refuses_one_teacher_for_two():
    """Each would pull it towards itself; two parts of one memory are two teachers."""
    p, q, memory = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2)), torch.zeros(5)
    for first, second in ((memory[:2], memory[:2]), (memory[1:3], memory[2:4])):
        with pytest.raises(ValueError, match=r"a teacher shares memory with another tensor of shape \[2\]"):
            AdamWEMA([p, q], teacher=[(p, first), (q, second)])
    optimizer = AdamWEMA([p, q], ema_decay=0.5, teacher=[(p, memory[:2]), (q, memory[2:4])])
    optimizer.step()
    assert memory.tolist() == [0, 0, 0.5, 0.5, 0]
    with pytest.raises(ValueError, match="a teacher shares memory with another tensor"):
        optimizer.add_param_group({"params": [nn.Parameter(memory[3:])]})
    assert len(optimizer.param_groups) == 1


def test_refuses_complex_parameters_and_sparse_gradients():
    with pytest.raises(ValueError, match=r"parameters must be floating-point, got torch.complex64"):
        AdamWEMA([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.eye(2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamWEMA([p]).step()


def test_refuses_moments_of_another_dtype():
    """After `bfloat16()` the moments are still float32; read as bfloat16 they would be noise."""
    p = nn.Parameter(torch.ones(4))
    optimizer = AdamWEMA([p])
    p.grad = torch.ones(4)
    optimizer.step()
    p.data = p.data.bfloat16()
    p.grad = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"a parameter is torch.bfloat16, its moments torch.float32 and torch.float32"):
        optimizer.step()


@pytest.mark.parametrize("own", [True, False])
def test_replaced_parameters_do_not_leave_a_teacher_standing(own):
    """A new tensor in a group has no teacher, and the old one's would follow nothing from there on."""
    old, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([old], teacher=None if own else [(old, torch.zeros(3))])
    old.grad, new.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new
    with pytest.raises(ValueError, match="1 of 1 teachers follow parameters that are no longer in any group"):
        optimizer.step()
    assert (new == 1).all()
    if own:  # the way on, as with moments
        optimizer.state[new] = optimizer.state.pop(old)
        before = optimizer.teacher_of(new).clone()
        optimizer.step()
        torch.testing.assert_close(optimizer.teacher_of(new), 0.996 * before + 0.004 * new.detach())


def transposed(tensor):
    """The same values, laid out by columns."""
    return tensor.detach().mT.contiguous().mT


def other_gradient(optimizer, p):
    p.grad = transposed(p.grad)


def expanded_gradient(optimizer, p):
    p.grad = torch.ones(1, device=p.device).expand(4, 4)


def other_data(optimizer, p):
    p.data = p.data.clone()


def other_layout(optimizer, p):
    p.data = transposed(p)


def same_memory(optimizer, p):
    p.data = p.data.mT


def other_moment(optimizer, p):
    optimizer.state[p]["exp_avg"] = transposed(optimizer.state[p]["exp_avg"])


def moment_in_the_same_memory(optimizer, p):
    optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"].mT


def teacher_of_other_layout(optimizer, p):
    optimizer.state[p]["ema"] = transposed(optimizer.state[p]["ema"])


def teacher_of_other_dtype(optimizer, p):
    optimizer.state[p]["ema"] = optimizer.state[p]["ema"].double()


def loaded(optimizer, p):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def added(optimizer, p):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, device=p.device))], "lr": 0.5})
    optimizer.param_groups[-1]["params"][0].grad = torch.ones(3, device=p.device)


def without_gradient(optimizer, p):
    optimizer.param_groups[0]["params"][0].grad = None


def narrower(optimizer, p):
    """The parameters and all of their state."""
    for tensor in optimizer.param_groups[0]["params"]:
        tensor.data, tensor.grad = tensor.data.bfloat16(), None
        tensor.grad = torch.ones_like(tensor)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[tensor][name] = optimizer.state[tensor][name].bfloat16()


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
@pytest.mark.parametrize(
    "change",
    [
        other_gradient, expanded_gradient, other_data, other_layout, same_memory, other_moment,
        moment_in_the_same_memory, teacher_of_other_layout, teacher_of_other_dtype, loaded, added, without_gradient,
        narrower,
    ],
)  # fmt: skip
def test_what_changes_between_steps_is_seen(change, device):
    """Steps that repeat skip most checks; after a change and before it, each is the formula."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 4, device=device)) for _ in range(3)]
    optimizer = AdamWEMA(params, lr=0.1, ema_decay=0.5)
    for step in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        if step >= 3:
            change(optimizer, params[1])
        every = [p for group in optimizer.param_groups for p in group["params"]]
        before = []
        for p in every:
            state = optimizer.state.get(p) or {"exp_avg": p * 0, "exp_avg_sq": p * 0, "step": 0, "ema": p}
            values = [state[name] for name in ("exp_avg", "exp_avg_sq", "ema")]
            grad = None if p.grad is None else p.grad.double()
            before.append(
                (p.detach().double(), grad, *(value.detach().double().clone() for value in values), int(state["step"]))
            )
        optimizer.step()
        for p, (value, grad, m, v, teacher, count) in zip(every, before, strict=True):
            lr = 0.1 if p.shape == (4, 4) else 0.5
            if grad is not None:
                value, m, v, teacher = adamw_ema_reference(
                    value, grad, m, v, count + 1, teacher,
                    lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, ema_decay=0.5,
                )  # fmt: skip
                count += 1
            else:
                teacher = 0.5 * teacher + 0.5 * value
            step_of = 2**-6 if p.dtype == torch.bfloat16 else 2**-20  # a few roundings
            state = optimizer.state[p]
            assert state["step"] == count
            expected = ((p, value), (state["exp_avg"], m), (state["exp_avg_sq"], v), (state["ema"], teacher))
            for got, want in expected:
                torch.testing.assert_close(got.detach().double(), want, rtol=step_of, atol=step_of * 0.1)


def test_nothing_is_held_back():
    """Neither gradients nor an optimiser's tensors stay alive for the next step's sake."""
    ours = parameters("cpu")
    optimizer = AdamWEMA(ours)
    give_gradients(ours, 0)
    optimizer.step()
    optimizer.step()
    gradient, moment = weakref.ref(ours[0].grad), weakref.ref(optimizer.state[ours[0]]["exp_avg"])
    optimizer.zero_grad()
    assert gradient() is None
    del optimizer
    gc.collect()
    assert moment() is None


@triton
@pytest.mark.skipif(not INTERPRETED, reason="looks at what kernels are given")
def test_what_a_graph_holds_lasts_as_long_as_a_parameter(device, monkeypatch):
    """Not as long as the dense copy that is stepped in the place of one with gaps."""
    seen, kept = [], multi_tensor.kept
    for module in (multi_tensor, adamw_step):
        monkeypatch.setattr(module, "kept", lambda *given: seen.append(given[2]) or kept(*given))
    p = nn.Parameter(torch.randn(6, 8, device=device)[:, ::2])
    p.grad = torch.ones_like(p)
    AdamWEMA([p]).step()
    assert len(seen) == 3  # addresses, pieces and numbers
    assert all(lasting is p for lasting in seen)
