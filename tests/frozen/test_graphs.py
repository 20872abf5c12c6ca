"""CUDA graphs of a frozen model: the bookkeeping against a stand-in for CUDA, and on a GPU the real thing."""

import contextlib
import threading

import pytest
import torch
from frozen_support import model
from hardware import GPU

from vit_fast import freeze
from vit_fast.frozen import graphs
from vit_fast.testing import randn

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")


def test_buckets():
    assert [graphs.bucket(b) for b in (1, 2, 7, 15, 16, 17, 31, 33, 100, 128, 129, 250)] == [
        1, 2, 7, 15, 16, 18, 32, 36, 104, 128, 144, 256,
    ]  # fmt: skip
    sizes = {graphs.bucket(b) for b in range(1, 1025)}
    assert all(b <= graphs.bucket(b) <= 1.125 * b for b in range(1, 1025)) and len(sizes) <= 16 + 6 * 8


class Recorder:
    """Stands for torch.cuda: a captured graph is its function, and replaying it calls it again, into the same results."""

    def __init__(self, monkeypatch):
        self.captures, self.replays, self.waits, self.records = 0, 0, 0, 0
        self.capturing = False
        recorder = self

        class Graph:
            def replay(self):
                recorder.replays += 1
                for result, fresh in zip(self.results, self.run(), strict=True):
                    result.copy_(fresh)

        class Event:
            def record(self, stream):
                recorder.records += 1

            def synchronize(self):
                pass

        class Stream:
            def wait_event(self, event):
                recorder.waits += 1

            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph, pool, capture_error_mode):
            assert pool == "pool" and capture_error_mode == "thread_local"
            recorder.captures += 1
            recorder.capturing = graph
            yield
            recorder.capturing = False

        for name, value in dict(
            graph_pool_handle=lambda: "pool",
            Event=Event,
            Stream=Stream,
            CUDAGraph=Graph,
            graph=capture,
            current_stream=Stream,
            stream=lambda s: contextlib.nullcontext(),
            device=lambda d: contextlib.nullcontext(),
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, images):
        """What is captured: twice the images, and in a list their sum."""
        results = {"double": images * 2, "sums": [images.sum((1, 2, 3))]}
        if self.capturing:
            graph = self.capturing
            graph.results = [results["double"], *results["sums"]]
            graph.run = lambda: [images * 2, images.sum((1, 2, 3))]
        return results


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def test_one_capture_for_each_size_and_results_that_stay(recorder):
    replay = graphs.Graphs(torch.device("cpu"))
    batches = [randn(b, 3, 4, 4, seed=b) for b in (17, 18, 17, 2)]
    results = [replay("logits", x, torch.float32, recorder.run) for x in batches]
    for x, found in zip(batches, results, strict=True):
        assert torch.equal(found["double"], x * 2)
        torch.testing.assert_close(found["sums"][0], x.sum((1, 2, 3)))
    assert recorder.captures == 2 and recorder.replays == 4  # 17 and 18 share one
    assert recorder.records == 4 and recorder.waits >= 4
    replay("tokens", batches[0], torch.float32, recorder.run)
    replay("logits", batches[0].contiguous(memory_format=torch.channels_last), torch.float32, recorder.run)
    assert recorder.captures == 4
    replay.clear()
    replay("logits", batches[0], torch.float32, recorder.run)
    assert recorder.captures == 5


def test_images_are_cast_on_the_way_in_and_a_given_buffer_is_not_copied(recorder):
    replay = graphs.Graphs(torch.device("cpu"))
    x = randn(3, 3, 4, 4)
    assert torch.equal(replay("a", x, torch.bfloat16, recorder.run)["double"], x.bfloat16() * 2)
    buffer = replay.input("b", x, torch.float32, recorder.run)
    buffer.copy_(x)
    assert torch.equal(replay("b", buffer, torch.float32, recorder.run)["double"], x * 2)
    assert replay.input("b", x, torch.float32, recorder.run).data_ptr() == buffer.data_ptr()


def test_threads_take_turns(recorder):
    replay = graphs.Graphs(torch.device("cpu"))
    wrong = []

    def work(seed):
        for _ in range(20):
            x = randn(2, 3, 4, 4, seed=seed)
            if not torch.equal(replay("a", x, torch.float32, recorder.run)["double"], x * 2):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and recorder.captures == 1


# ---- On a GPU -------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_replayed_and_eager_are_the_same(dtype):
    source = model(vis=True).cuda()
    replayed = freeze(source, dtype=dtype)  # which checks itself
    eager = freeze(source, dtype=dtype, cuda_graphs=False)
    names = ("logits", "tokens", "layer:0", "attention_class_token")
    for batch in (1, 2, 17, 18, 1):
        images = randn(batch, 3, 64, 96, device="cuda", seed=batch)
        found, expected = replayed(images, outputs=names), eager(images, outputs=names)
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)


@needs_gpu
def test_streams_threads_and_allocator_churn():
    frozen = freeze(model().cuda())
    inputs = [randn(2, 3, 64, 96, device="cuda", seed=i) for i in range(4)]
    expected = [frozen(x)[0] for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                churn = torch.randn(1 << 20, device="cuda")
                found = frozen(inputs[i])[0]
                del churn
                torch.cuda.empty_cache() if i == 0 else None
                if not torch.equal(found, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_gpu
def test_bytes_buffers_and_refresh():
    source, other = model().cuda(), model(seed=1).cuda()
    frozen = freeze(source, images="uint8", mean=0.5, std=0.5)
    images = torch.randint(256, (3, 64, 96, 3), dtype=torch.uint8, device="cuda")
    expected = frozen(images)[0]
    buffer = frozen.input_buffer(3)
    buffer.copy_(images.permute(0, 3, 1, 2))
    assert torch.equal(frozen(buffer)[0], expected)
    source.load_state_dict(other.state_dict())
    frozen.refresh()
    fresh = freeze(other, images="uint8", mean=0.5, std=0.5)
    assert torch.equal(frozen(images)[0], fresh(images)[0])


@needs_gpu
def test_inside_somebody_elses_capture():
    frozen = freeze(model().cuda(), check=False)
    images = randn(2, 3, 64, 96, device="cuda")
    expected = frozen(images)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = frozen(images)[0]
    graph.replay()
    torch.testing.assert_close(found, expected)
