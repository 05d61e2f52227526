"""The engine as the front sees it (client, journal, supervisor), and its process (process, loop). Messages are all that passes between."""
