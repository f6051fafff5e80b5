/* Everything of ours that runs inside a pod: its first process, and the words that the engine has executed beside it.
 *
 *   init first IP PORT  pid 1: finds out that network policy is in force, says so in its name, reaps orphans for ever
 *   init listen PORT    pid 1 of the listener that `first` must fail to reach
 *   init reach IP PORT  pid 1 of the control: ends well once the listener was reached
 *   init wait           waits for the finding of `first` and prints it
 *   init about          which kernel this is: its version, and what it logs (gVisor names itself there)
 *   init upload         writes the files that come on stdin below /work
 *   init step           plays one step: request on stdin, frames on stdout, the step's own end as its exit status
 *   init kill           SIGKILL to every process but pid 1, until none is left
 *   init list           kill; then says what is below /work
 *   init fetch          kill; then the files that are asked for, as a tar
 *
 * A guest has the same uid. It can neither look into these processes nor write to their streams: the file's mode is 0111,
 * and a process whose program it may not read is not dumpable from its first instruction (ptrace(2), prctl(2)); gVisor
 * starts no such file, so there they are not dumpable from their first system call. It can end them, on Linux all but
 * pid 1; the node then says 137, and that is never taken for success. Freestanding: no library, nothing of the image's
 * root file system is needed. Built by hatch_build.py like gVisor's init; protocol.py is the other side.
 */

#include "inside/files.h"
#include "inside/step.h"

__attribute__((noreturn, used)) void begin(const long *stack) {
    long count = stack[0];
    const char *const *words = (const char *const *)(stack + 1);

    block(BIT(SIGCHLD) | BIT(SIGTERM) | BIT(SIGPIPE));
    call(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0);
    if (count == 4 && same(words[1], "first")) be_first(words[2], words[3]);
    if (count == 3 && same(words[1], "listen")) be_listener(words[2]);
    if (count == 4 && same(words[1], "reach")) be_control(words[2], words[3]);
    if (count == 2 && same(words[1], "wait")) await_shut();
    if (count == 2 && same(words[1], "about")) say_kernel();
    if (count == 2 && same(words[1], "upload")) upload();
    if (count == 2 && same(words[1], "step")) step();
    if (count == 2 && same(words[1], "kill")) leave(kill_all() ? 0 : OURS_FAILED);
    if (count == 4 && same(words[1], "list")) list(number_in(words[2]), number_in(words[3]));
    if (count == 2 && same(words[1], "fetch")) fetch();
    leave(OURS_MISUSED);
}
