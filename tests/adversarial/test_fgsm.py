"""FGSM: within ε and the valid range, raises the loss, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_absa.adversarial.fgsm import has_floats, perturb

EPSILON = 0.03
MEAN = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
STD = torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
VALID = ((0 - MEAN) / STD, (1 - MEAN) / STD)


@pytest.fixture(name="model")
def _model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    model(torch.randn(16, 3, 8, 8))  # running statistics other than the initial ones
    model[1].eval()
    return model


@pytest.fixture(name="pixels")
def _pixels():
    """Images in [0, 1], many of whose pixels are black or white."""
    torch.manual_seed(1)
    return (torch.rand(32, 3, 8, 8) * 1.4 - 0.2).clamp(0, 1)


@pytest.fixture(name="targets")
def _targets():
    return torch.arange(32) % 4


def attack(model, pixels, targets, loss=F.cross_entropy, epsilon=EPSILON):
    return perturb(model, loss, (pixels - MEAN) / STD, targets, epsilon / STD, VALID)


def test_every_pixel_stays_within_epsilon_and_the_valid_range(model, pixels, targets):
    moved = attack(model, pixels, targets) * STD + MEAN
    assert (moved - pixels).abs().max() <= EPSILON + 1e-6
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    free = (pixels > EPSILON) & (pixels < 1 - EPSILON)
    assert ((moved - pixels).abs()[free] > EPSILON - 1e-5).float().mean() > 0.9


def test_the_loss_rises(model, pixels, targets):
    inputs, moved = (pixels - MEAN) / STD, attack(model, pixels, targets)
    model.eval()
    with torch.no_grad():
        before = F.cross_entropy(model(inputs), targets, reduction="none")
        after = F.cross_entropy(model(moved), targets, reduction="none")
    assert (after > before).float().mean() > 0.95


def test_the_step_is_the_sign_of_the_gradient_in_evaluation_mode(model, pixels, targets):
    inputs = ((pixels - MEAN) / STD).requires_grad_()
    moved = attack(model, pixels, targets)
    model.eval()
    F.cross_entropy(model(inputs), targets).backward()
    expected = (inputs + EPSILON / STD * inputs.grad.sign()).clamp(*VALID)
    torch.testing.assert_close(moved, expected.detach())


def test_nothing_else_is_changed(model, pixels, targets):
    inputs = (pixels - MEAN) / STD
    F.cross_entropy(model(inputs), targets).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    flags = [module.training for module in model.modules()]
    assert set(flags) == {True, False}
    kept, random = inputs.clone(), torch.get_rng_state()

    moved = perturb(model, F.cross_entropy, inputs, targets, EPSILON / STD, VALID)

    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
    pairs = zip(gradients, model.parameters(), strict=True)
    assert all(torch.equal(gradient, parameter.grad) for gradient, parameter in pairs)
    assert torch.equal(inputs, kept)
    assert not inputs.requires_grad
    assert not moved.requires_grad
    assert moved.data_ptr() != inputs.data_ptr()


def test_parameters_without_gradient_get_none(model, pixels, targets):
    attack(model, pixels, targets)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_hooks_are_not_called(model, pixels, targets):
    def reduced(_):
        raise AssertionError("a gradient hook was called")

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(reduced)
    attack(model, pixels, targets)


def test_with_gradients_disabled(model, pixels, targets):
    with torch.no_grad():
        off = attack(model, pixels, targets)
        assert not torch.is_grad_enabled()
    assert torch.equal(off, attack(model, pixels, targets))


def test_a_failing_loss_restores_the_training_flags(model, pixels, targets):
    def failing(*_):
        raise FloatingPointError

    flags = [module.training for module in model.modules()]
    with pytest.raises(FloatingPointError):
        attack(model, pixels, targets, loss=failing)
    assert [module.training for module in model.modules()] == flags


def test_a_step_of_zero_changes_nothing(model, pixels, targets):
    torch.testing.assert_close(attack(model, pixels, targets, epsilon=0.0), (pixels - MEAN) / STD)


def reference(model, inputs, targets, count):
    """The first inputs moved along the gradient of the whole batch."""
    inputs = inputs.clone().requires_grad_()
    model.eval()
    F.cross_entropy(model(inputs), targets).backward()
    moved = (inputs + EPSILON / STD * inputs.grad.sign()).clamp(*VALID).detach()
    return torch.cat([moved[:count], inputs[count:].detach()])


def test_a_part_of_the_batch(model, pixels, targets):
    inputs = (pixels - MEAN) / STD
    moved = perturb(model, F.cross_entropy, inputs, targets, EPSILON / STD, VALID, 12)
    torch.testing.assert_close(moved, reference(model, inputs, targets, 12))


class Seen(nn.Module):
    """Records the size and layout of its inputs, and changes them in place."""

    def __init__(self, *layers):
        super().__init__()
        self.body, self.inputs = nn.Sequential(*layers), []

    def forward(self, x):
        self.inputs.append((len(x), x.stride()))
        return self.body(x.mul_(2))


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_model_sees_what_training_gives_it(pixels, targets, batch_statistics, memory_format):
    norm = nn.BatchNorm2d(4, track_running_stats=not batch_statistics)
    model = Seen(nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(144, 4))
    inputs = ((pixels - MEAN) / STD).contiguous(memory_format=memory_format)
    before = inputs.clone()
    moved = perturb(model, F.cross_entropy, inputs, targets, EPSILON / STD, VALID, 12)
    assert model.inputs == [(32 if batch_statistics else 12, inputs.stride())]
    assert torch.equal(inputs, before)
    plain = nn.Sequential(*model.body)
    torch.testing.assert_close(moved, reference(Doubled(plain), inputs, targets, 12))


class Doubled(nn.Module):
    """`model(2 x)`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(2 * x)


@pytest.mark.parametrize("count", [1, 12])
def test_a_model_of_one_batch_size(pixels, targets, count):
    """It takes the whole batch only; a single sample is never given alone."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(192, 4)

        def forward(self, x):
            return self.head(x.view(32, -1))

    inputs, model = (pixels - MEAN) / STD, Fixed()
    moved = perturb(model, F.cross_entropy, inputs, targets, EPSILON / STD, VALID, count)
    torch.testing.assert_close(moved, reference(model, inputs, targets, count))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(model, pixels, targets, reentrant):
    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=reentrant)

    wrapper = Checkpointed()
    wrapper.inner = model
    inputs = (pixels - MEAN) / STD
    moved = perturb(wrapper, F.cross_entropy, inputs, targets, EPSILON / STD, VALID)
    torch.testing.assert_close(moved, reference(model, inputs, targets, 32))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_with_its_denominator(model, pixels, targets):
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    torch.testing.assert_close(
        attack(model, pixels, targets, loss=loss), attack(model, pixels, targets)
    )


def test_samples_without_a_target_are_not_moved(model, pixels, targets):
    """Their loss, the mean over the targets that count, is 0 / 0."""

    def loss(outputs, targets):
        counts = (targets >= 0).to(outputs)
        losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
        return (losses * counts).sum() / counts.sum()

    targets[:3] = -1
    inputs = (pixels - MEAN) / STD
    moved = perturb(model, loss, inputs, targets, EPSILON / STD, VALID, 3)
    torch.testing.assert_close(moved, inputs)


# Nested inputs


class TwoInputs(nn.Module):
    def forward(self, inputs):
        return (inputs["x"] * inputs["scale"]).sum(1) + inputs["ids"].sum(1)


def nested(n=4):
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, n, 3, generator=generator)
    return {"x": x, "scale": scale, "ids": torch.arange(3 * n).view(n, 3), "name": "a"}


@pytest.mark.parametrize("count", [None, 2])
def test_all_floating_point_tensors_of_nested_inputs_are_moved(count):
    inputs = nested()
    step, targets = torch.tensor(0.1), torch.zeros(4)

    def loss(outputs, targets):
        return (outputs - targets).mean()  # whose gradient is x by scale, and scale by x

    moved = perturb(TwoInputs(), loss, inputs, targets, step, None, count)
    rows = slice(count)
    for name, gradient in (("x", inputs["scale"]), ("scale", inputs["x"])):
        low, high = inputs[name].amin(), inputs[name].amax()
        expected = inputs[name].clone()
        expected[rows] = (expected + 0.1 * gradient.sign()).clamp(low, high)[rows]
        torch.testing.assert_close(moved[name], expected)
    assert moved["ids"] is inputs["ids"]
    assert moved["name"] == "a"
    assert not has_floats({"ids": inputs["ids"], "name": "a"})
