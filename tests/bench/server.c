/*
 * The yardstick: a pre-fork echo server with nothing in it but system calls.
 *
 *     server connect|persistent|udp PROCESSES
 *
 * Binds a free port of 127.0.0.1, forks PROCESSES children that all block in accept (or recvfrom) on the one
 * socket, prints "ready PORT" and waits. SIGTERM ends the children, reaps them and exits 0. It never counts,
 * logs, times out or replaces a child: what it leaves out is what a daemon is compared with.
 *
 *   connect      accept, recv once, send it back, shut down the writing side, close
 *   persistent   accept, then recv and send until the client hangs up
 *   udp          recvfrom, sendto
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUFFER = 8192, BACKLOG = 1024, MOST_PROCESSES = 64 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int send_all(int fd, const char *data, ssize_t size)
{
    while (size > 0) {
        ssize_t sent = send(fd, data, (size_t)size, MSG_NOSIGNAL);
        if (sent < 0)
            return -1;
        data += sent;
        size -= sent;
    }
    return 0;
}

static void serve_stream(int listener, int persistent)
{
    char buffer[BUFFER];
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue; /* a client that left before it was accepted: the next one */
        ssize_t size;
        do {
            size = recv(fd, buffer, sizeof buffer, 0);
        } while (size > 0 && send_all(fd, buffer, size) == 0 && persistent);
        shutdown(fd, SHUT_WR);
        close(fd);
    }
}

static void serve_datagrams(int fd)
{
    char buffer[BUFFER];
    for (;;) {
        struct sockaddr_in client;
        socklen_t length = sizeof client;
        ssize_t size = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&client, &length);
        if (size >= 0)
            sendto(fd, buffer, (size_t)size, 0, (struct sockaddr *)&client, length);
    }
}

static int bound(int type, struct sockaddr_in *address)
{
    socklen_t length = sizeof *address;
    int one = 1;
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)address, sizeof *address) < 0)
        fail("bind");
    if (type == SOCK_STREAM && listen(fd, BACKLOG) < 0)
        fail("listen");
    if (getsockname(fd, (struct sockaddr *)address, &length) < 0)
        fail("getsockname");
    return fd;
}

int main(int argc, char **argv)
{
    int processes = argc == 3 ? atoi(argv[2]) : 0;
    if (processes < 1 || processes > MOST_PROCESSES) {
        fprintf(stderr, "usage: server connect|persistent|udp PROCESSES\n");
        return 2;
    }
    int udp = strcmp(argv[1], "udp") == 0, persistent = strcmp(argv[1], "persistent") == 0;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = bound(udp ? SOCK_DGRAM : SOCK_STREAM, &address);

    prctl(PR_SET_PDEATHSIG, SIGTERM); /* whoever measures may be killed: nothing is left running */
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    sigprocmask(SIG_BLOCK, &stop, NULL); /* held until sigwait below: one in between is not lost */

    pid_t parent = getpid(), children[MOST_PROCESSES];
    for (int i = 0; i < processes; i++) {
        children[i] = fork();
        if (children[i] < 0)
            fail("fork");
        if (children[i] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent)
                _exit(0);
            if (udp)
                serve_datagrams(fd);
            serve_stream(fd, persistent);
        }
    }
    printf("ready %d\n", ntohs(address.sin_port));
    fflush(stdout);

    int signal_number;
    sigwait(&stop, &signal_number);
    for (int i = 0; i < processes; i++)
        kill(children[i], SIGKILL);
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}
