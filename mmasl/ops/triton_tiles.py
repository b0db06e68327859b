"""How many elements and warps a program of the Triton kernel has. They change the speed and not the method."""
DEFAULT = 2048, 4
# By architecture and size ('large' from a million logits on); others take the default. benchmarks/speed/run.py writes
# them from the rows of benchmarks/speed/tiles_cuda.csv.
TILES: dict[tuple[str, str], tuple[int, int]] = {}
