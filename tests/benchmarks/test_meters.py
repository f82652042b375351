"""The meter that the benchmark compares with, on work whose memory is known."""

import torch

from orpo_lite.train.bench import peak_over

CPU = torch.device("cpu")
MB = 1 << 20


def test_counts_what_is_alive_at_once():
    weight = torch.zeros(MB)  # 4 MB that were there before

    def work():
        a = torch.empty(MB)  # 4
        b = torch.empty(2 * MB)  # 12
        del a
        c = weight.view(-1)  # a view of what was there: nothing
        d = torch.empty(MB)  # 12 again
        d.add_(c)
        return b, d

    assert peak_over(work, CPU) == 12 * MB


def test_storages_are_counted_once_and_freed():
    def work():
        for _ in range(3):
            a = torch.ones(MB)
            views = [a[i:] for i in range(10)]
            del a, views

    assert peak_over(work, CPU) == 4 * MB


def test_sees_activations_and_the_backward_pass():
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(1024, 256)

    def chain(layers):
        h = x
        for _ in range(layers):
            h = torch.tanh(h @ weight)
        h.sum().backward()
        weight.grad = None

    short, long = peak_over(lambda: chain(2), CPU), peak_over(lambda: chain(6), CPU)
    assert abs((long - short) - 4 * MB) < 0.3 * MB  # tanh keeps its output, 1 MB a layer
