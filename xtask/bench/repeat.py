"""CMD ARGS…: reads milliseconds, one number a line; for each, runs the command again and again so
long, and prints how often."""
import subprocess
import sys
import time

for line in iter(sys.stdin.readline, ""):
    end = time.monotonic() + int(line) / 1000
    done = 0
    while done == 0 or time.monotonic() < end:
        subprocess.run(sys.argv[1:], check=True)
        done += 1
    print(done, flush=True)
