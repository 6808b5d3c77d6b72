"""The configs accept exactly what the networks have modules for."""

from sana_cli.kernels.rms_norm import ACTIVATIONS
from sana_cli.models.configs import BLOCK_TYPES, CONV_ACTIVATIONS
from sana_cli.models.dc_ae import BLOCKS


def test_every_block_and_activation_that_a_config_may_name_is_there():
    assert set(BLOCKS) == set(BLOCK_TYPES)
    assert set(ACTIVATIONS) == set(CONV_ACTIVATIONS)
