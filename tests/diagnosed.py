"""The training that the tests of diagnoses take for granted: digits, and a small net of which all knobs can be varied."""

import jax
import optax

import fnn
from fnn.diagnosis.case import case_of

TRAIN, TEST = fnn.data.standardize(*fnn.data.digits(key=jax.random.key(0)))


def build(depth=1, width=16, activation="relu", norm="none", init="he_normal", head="identity"):
    return fnn.models.mlp(depth, width, 10, activation=activation, norm=norm, init=init, head=head)


def sgd(rate=0.1, clip=None):
    return optax.sgd(rate) if clip is None else optax.chain(optax.clip_by_global_norm(clip), optax.sgd(rate))


def case(train=TRAIN, test=TEST, loss=fnn.losses.cross_entropy, net=build, **options):
    options = {"batch_size": 64, "steps": 30, "seeds": 2, "shuffle": True} | options
    return case_of(net, loss, sgd, train, test, **options)
