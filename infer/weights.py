import phi4rv


def load(path, device, dtype, kernels, weights=None):
    return phi4rv.load(path, device, dtype, kernels)
