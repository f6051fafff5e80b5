/* The sandbox's first process, guest uid 0 without capabilities.
 *
 *   init         write one byte to stdout (the guest is up), then reap orphans for ever
 *   init kill    as the steps' uid: SIGKILL to every process it may signal, which is that uid's and never pid 1
 *
 * It runs before and between the tenant's steps, so it takes no input, opens nothing and allocates nothing; no C library,
 * no shell and no `kill` of the guest's root file system is needed. Built by hatch_build.py: cc -Os -static -nostdlib
 * -ffreestanding -fno-stack-protector.
 */

#if defined(__x86_64__)
enum { SYS_write = 1, SYS_rt_sigprocmask = 14, SYS_exit = 60, SYS_wait4 = 61, SYS_kill = 62, SYS_rt_sigtimedwait = 128 };

static long call(long number, long a, long b, long c, long d) {
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return number;
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");

#elif defined(__aarch64__)
enum { SYS_write = 64, SYS_exit = 93, SYS_kill = 129, SYS_rt_sigprocmask = 135, SYS_rt_sigtimedwait = 137, SYS_wait4 = 260 };

static long call(long number, long a, long b, long c, long d) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c, x3 __asm__("x3") = d;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
}

__asm__(".globl _start\n_start: mov x29, #0\n mov x0, sp\n bl begin\n");

#else
#error "init.c knows x86_64 and aarch64"
#endif

enum { SIG_BLOCK = 0, WNOHANG = 1, SIGKILL = 9, SIGCHLD = 17, EVERY_PROCESS = -1, ANY_CHILD = -1 };

__attribute__((noreturn, used)) void begin(const long *stack) {
    const unsigned long child_ended = 1UL << (SIGCHLD - 1);

    if (stack[0] > 1) { /* argc: whatever the word is, this mode only ever kills */
        long failed = call(SYS_kill, EVERY_PROCESS, SIGKILL, 0, 0);
        for (;;) call(SYS_exit, failed != 0, 0, 0, 0);
    }
    /* Blocked before the ready byte: a child that ends between wait4 and rt_sigtimedwait leaves the signal pending. */
    call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&child_ended, 0, sizeof child_ended);
    call(SYS_write, 1, (long)"+", 1, 0);
    for (;;) {
        while (call(SYS_wait4, ANY_CHILD, 0, WNOHANG, 0) > 0) {
        }
        call(SYS_rt_sigtimedwait, (long)&child_ended, 0, 0, sizeof child_ended);
    }
}
