"""Encoders of grids: what they must and must not see."""

import pytest
import torch

from seqjepa.engine.models.encoders.config import GridCellsConfig, GridConvNetConfig, GridObjectsConfig
from seqjepa.loaders.grids.moves import OUTSIDE
from seqjepa.loaders.images import find_dataset


@pytest.fixture
def grids():
    pixels = find_dataset("object_grids").read(None, "test", False).pixels[:64]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("config", [GridObjectsConfig(), GridConvNetConfig(), GridCellsConfig()])
def test_features_tell_grids_apart(config, grids):
    torch.manual_seed(0)
    features = config.build().eval()(grids.view(8, 8, 1, 14, 14))
    assert features.shape == (8, 8, config.num_features)
    distances = torch.cdist(features.flatten(0, 1), features.flatten(0, 1)) + 1e9 * torch.eye(64)
    equal = (grids[:, None] == grids).flatten(2).all(2) & ~torch.eye(64, dtype=torch.bool)
    assert (distances.min() > 1e-4) == (not equal.any())


def test_objects_do_not_see_the_canvas(grids):
    """A grid has the same features on a larger canvas."""
    torch.manual_seed(0)
    encoder = GridObjectsConfig().build().eval()
    larger = torch.nn.functional.pad(grids, (0, 16, 0, 16), value=OUTSIDE)
    torch.testing.assert_close(encoder.features(larger), encoder.features(grids))


def test_objects_that_do_not_meet_do_not_see_each_other():
    """Their tokens are those that each has alone, unless all attend to all."""
    both = torch.full((1, 1, 14, 14), 0.0)
    both[..., :2, :2] = 3
    one = both.clone()
    both[..., 8:10, 8:11] = 5
    for attention, alone in (("adjacent", True), ("all", False)):
        torch.manual_seed(0)
        encoder = GridObjectsConfig(attention=attention).build().eval()
        whole, single = (encoder.tokens(encoder.objects(x)) for x in (both, one))
        assert torch.allclose(whole[0, 1], single[0, 0], atol=1e-6) == alone  # slot 0 is the larger one
    near = both.clone()
    near[..., 2:4, 2:5] = 5
    near[..., 8:10, 8:11] = 0
    torch.manual_seed(0)
    encoder = GridObjectsConfig().build().eval()
    assert not torch.allclose(encoder.tokens(encoder.objects(near))[0, 1], single[0, 0], atol=1e-6)


def test_empty_slots_change_nothing(grids):
    torch.manual_seed(0)
    few, many = GridObjectsConfig(slots=32).build().eval(), GridObjectsConfig(slots=64).build().eval()
    many.load_state_dict(few.state_dict())
    torch.testing.assert_close(few.features(grids), many.features(grids))


def test_a_grid_without_objects_has_finite_features_and_gradients():
    torch.manual_seed(0)
    encoder = GridObjectsConfig().build()
    encoder.features(torch.zeros(2, 1, 14, 14)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_a_compiled_encoder_finds_the_same_objects(grids):
    """With a fixed number of rounds, as the host cannot wait."""
    torch.manual_seed(0)
    encoder = GridObjectsConfig().build().eval()
    compiled = torch.compile(encoder.features, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grids), encoder.features(grids))


def test_more_slots_than_cells_are_empty(grids):
    torch.manual_seed(0)
    few, many = GridObjectsConfig(slots=64).build().eval(), GridObjectsConfig(slots=250).build().eval()
    many.load_state_dict(few.state_dict())
    torch.testing.assert_close(few.features(grids), many.features(grids))
