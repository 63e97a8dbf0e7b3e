import os

# before torch is imported, which reads the second; for the commands that tests start as well: two tests run at a time
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
