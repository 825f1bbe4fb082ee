"Figures of speed and size: `python -m tests.bench`. They are printed and never asserted, since machines differ."
import statistics
import time


def seconds(*calls, repeat=7):
    "Median time of each call; the calls take turns, so that a disturbance meets all of them."
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


def wall_and_cpu(*calls, repeat=7, warm=True):
    "Medians of each call by the clock on the wall and by the processor's own; other programs disturb the first."
    for call in calls if warm else (): call()
    walls, cpus = [[] for _ in calls], [[] for _ in calls]
    for _ in range(repeat):
        for call, wall, cpu in zip(calls, walls, cpus):
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
    return [statistics.median(t) for t in walls], [statistics.median(t) for t in cpus]
