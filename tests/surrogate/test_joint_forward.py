"""One product for the first layers of all parts: equal to each part computed alone."""

import numpy as np
import pytest
import torch

from surrogate.joint_forward import JointForward
from surrogate.models.network import InfluenceNetwork
from surrogate.perceptron import Perceptron
from surrogate.scaling import FEATURE_CLIP, FeatureScaler


def _network(X, hidden="8,5"):
    rng = np.random.default_rng(1)
    y = np.tanh(X[:, :3]) @ rng.normal(size=(3, 2))
    return InfluenceNetwork(hidden=hidden, ensemble=3, max_epochs=3).fit(X, y)


def _alone(member, features):
    return member.output(torch.from_numpy(member.scaler.transform(features)))


@pytest.mark.parametrize("hidden", ["16", "8,5"])
def test_every_part_gives_what_it_gives_alone(hidden):
    X = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    network = _network(X, hidden)
    joint = network._joint_forward()
    assert len(joint.groups) == 1
    outputs, linear = joint.outputs(X)
    for member, found in zip(network.members_, outputs, strict=True):
        torch.testing.assert_close(found, _alone(member, X), rtol=1e-5, atol=1e-5)
    expected = torch.from_numpy(network._linear_scaler.transform(X)) @ network.weights_
    torch.testing.assert_close(linear, expected, rtol=1e-5, atol=1e-5)


def test_parts_with_other_means_form_a_group_of_their_own():
    rng = np.random.default_rng(0)
    X, later = rng.normal(size=(200, 12)).astype(np.float32), rng.normal(3, 2, size=(200, 12)).astype(np.float32)
    y = np.tanh(later[:, :2])
    warm = InfluenceNetwork(hidden="8,5", ensemble=3, max_epochs=2).fit(later, y, warm_start=_network(X))
    joint = warm._joint_forward()
    assert len(joint.groups) == 2
    outputs, _ = joint.outputs(later)
    for member, found in zip(warm.members_, outputs, strict=True):
        torch.testing.assert_close(found, _alone(member, later), rtol=1e-5, atol=1e-5)


def test_columns_far_from_zero_outliers_and_constant_columns_are_read_as_the_scaler_reads_them():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4)).astype(np.float32)
    X[:, 1] = 3e6 + rng.integers(0, 3, size=300)  # 24 bits of the mean alone would miss its fraction
    X[:, 2] = 7.25
    X[0, 3] = 1e30
    scaler = FeatureScaler().fit(X[1:])
    member = Perceptron.new(scaler, [4, 6, 2], torch.Generator().manual_seed(0))
    torch.nn.init.normal_(member.weights[-1])
    outputs, linear = JointForward.of([member], None).outputs(X)
    assert linear is None
    assert scaler.transform(X)[0, 3] == FEATURE_CLIP
    torch.testing.assert_close(outputs[0], _alone(member, X), rtol=1e-5, atol=1e-5)
