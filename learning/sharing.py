"""The images of a call, shared out among its processes and those of other calls."""

from collections.abc import Iterator, Sequence

from learning.processes import Team, everyone
from tissue.claims import Job
from tissue.inputs import Task


def shared_out(
    job: Job, tasks: Sequence[Task], todo: Sequence[Task]
) -> Iterator[tuple[Task, Team]]:
    """The images that this process is to work on, one after the other, and with whom.

    Each process takes the next of `todo` that nobody has claimed. Where fewer big ones are left
    than processes, these come first, and all processes of the call share each. `tasks` has all
    images as they were planned, in all processes alike. At the end all wait for each other.
    """
    everyone(None)  # nobody writes before all have looked what is to be done
    team, by_name = Team(), {task.pair.name: task for task in tasks}
    big = [task.pair.name for task in todo if task.is_shared]
    big = team.first(lambda: big if len(big) < team.place[1] else [])
    together = {name: by_name[name] for name in big}
    alone = {task.pair.name: by_name[task.pair.name] for task in todo}
    alone = {name: task for name, task in alone.items() if name not in together}

    def take():
        task = job.take(together)
        return task.pair.name if task else None

    while name := team.first(take):
        yield by_name[name], team
    while task := job.take(alone):
        yield task, Team(alone=True)
    everyone(None)
