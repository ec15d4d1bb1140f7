"""What does each of two inputs contribute, when the other one is noise?

A net that sees an image of a digit and hears a "sound", sixteen numbers around a centre for each class. It is trained on both
with either replaced by noise in a third of the examples, so that it learns to lean on what is there, and judged with both,
with one of them replaced by noise, and with none left, where it can only guess.
"""

import sys

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn

CONDITIONS = ("both", "sound is noise", "image is noise", "both are noise")


def run(options: common.Options) -> common.Result:
    seeds, epochs = options.pick((5, 30), (1, 6))
    runs = np.array([train(seed, epochs) for seed in range(seeds)])  # [seeds, conditions]
    means = runs.mean(axis=0)
    both, image, sound, none = means
    checks = [
        common.at_least("both inputs: test accuracy", options.pick(0.98, 0.9), both),
        common.at_least("image, the sound being noise: five times guessing", 0.5, image),
        common.at_least("sound, the image being noise: five times guessing", 0.5, sound),
        common.at_least("what the image adds to the sound alone", 0.02, both - sound),
        common.at_least("what the sound adds to the image alone", 0.0, both - image),
        common.close("neither: test accuracy", 0.1, none, 0.06),
    ]
    figure, axes = common.panels(1)
    axes[0, 0].bar(range(4), means, yerr=runs.std(axis=0), color=common.COLOURS[0], capsize=3)
    common.chance(axes[0, 0], 0.1)
    axes[0, 0].set_ylim(0, 1.05)
    axes[0, 0].set_xticks(
        range(4), [c.replace(" is ", "\nis ").replace(" are ", "\nare ") for c in CONDITIONS], fontsize=8
    )
    common.finish(axes[0, 0], "digits seen and heard", "", "test accuracy")
    common.caption(figure, f"mean of {seeds} seeds, bars of one standard deviation")
    remarks = [f"{seeds} seeds, {epochs} epochs, stratified 80/20 split; dotted: guessing. Bars: standard deviation."]
    return common.Result(checks, figure, remarks)


def network() -> fnn.Layer:
    """Each input through a net of its own to 32 numbers, side by side into one classifier."""
    image = fnn.serial(
        fnn.conv(16, 3), fnn.batch_norm(), fnn.activation("relu"), fnn.max_pool(2), fnn.flatten(), fnn.dense(32)
    )
    sound = fnn.serial(fnn.dense(32), fnn.activation("relu"), fnn.dense(32))
    joined = [fnn.activation("relu"), fnn.dense(32), fnn.activation("relu"), fnn.dense(10)]
    return fnn.serial(fnn.branches({"image": image, "sound": sound}), fnn.concatenate(), *joined)


def train(seed: int, epochs: int) -> list[float]:
    """Test accuracy under each of the conditions."""
    keys = jax.random.split(jax.random.key(seed), 7)
    seen, seen_test = fnn.data.digits(key=keys[0], image=True)
    centres = jax.random.normal(keys[1], (10, 16))
    heard, heard_test = (
        centres[part.y] + 1.2 * jax.random.normal(k, (part.size, 16))
        for part, k in ((seen, keys[2]), (seen_test, keys[3]))
    )
    spoiled = jax.random.randint(keys[4], (seen.size,), 0, 3)  # 0 neither, 1 the sound, 2 the image
    noise, noise_test = (
        {
            "image": jax.random.normal(k, part.x.shape),
            "sound": 1.6 * jax.random.normal(jax.random.fold_in(k, 1), h.shape),
        }
        for k, part, h in ((keys[5], seen, heard), (keys[6], seen_test, heard_test))
    )
    x = {
        "image": jnp.where((spoiled == 2)[:, None, None, None], noise["image"], seen.x),
        "sound": jnp.where((spoiled == 1)[:, None], noise["sound"], heard),
    }
    net, optimizer = network(), optax.adam(2e-3)
    state = fnn.TrainState.create(net, optimizer, jax.random.key(seed), x)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer)
    state, _ = fnn.fit(step, state, (x, seen.y), epochs=epochs, batch_size=64, key=jax.random.key(seed))
    test = {"image": seen_test.x, "sound": heard_test}
    results = []
    for spoil in ((), ("sound",), ("image",), ("image", "sound")):
        given = test | {name: noise_test[name] for name in spoil}
        results.append(fnn.evaluate(net, state, (given, seen_test.y))["accuracy"])
    return results


if __name__ == "__main__":
    sys.exit(common.main(__file__, __doc__, run))
