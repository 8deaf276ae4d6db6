"""The catalogue in a browser: search, compare, run and read reports, on this machine.

    pluribus.ui.run.serve(port=0, ready=print)

Pages are rendered here and read the same without script; nothing is asked of any other address.
Needs the extra `serve`.
"""
