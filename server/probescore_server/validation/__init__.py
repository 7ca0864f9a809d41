"""From what a client asks to checked rollouts of ids.

Every check of a request's content is here, and each names the field at fault as in the proto. Used by the front process and by
``Engine.score`` alike, so it imports neither torch nor grpc.
"""
