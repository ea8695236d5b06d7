"""The parts of benchmarks.gpu_report, one stage or concept per file."""
