from rsauto.cli import run

run()
