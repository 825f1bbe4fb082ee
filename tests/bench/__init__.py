"Figures of speed and size: `python -m tests.bench`. They are printed and never asserted, since machines differ."
import statistics
import time


def seconds(*calls, repeat=7):
    "Median wall time of each call; the calls take turns, so that a disturbance meets all of them."
    for call in calls: call()  # the first call pays for caches
    times = [[] for _ in calls]
    for _ in range(repeat):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def milliseconds(value):
    return f"{1e3 * value:.2f} ms" if value < 0.1 else f"{1e3 * value:.0f} ms"
