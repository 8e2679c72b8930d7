/*
 * The load generator: CLIENTS processes, each in a loop with a server on 127.0.0.1: a closed one, but for "steady".
 *
 *     load connect|steady|persistent|udp PORT CLIENTS SECONDS
 *
 * Prints one line, "count=… errors=… seconds=… p50_us=… p99_us=… max_us=…": exchanges completed within SECONDS,
 * exchanges that failed, and how long one took. Every answer is compared with what was sent. Clients are
 * processes, not threads, so that they share no descriptor table whose lock they would measure instead.
 *
 *   connect      connect, send, receive until the server hangs up, close. The server closes first, so TIME_WAIT
 *                is on its side and no port of ours is used up.
 *   steady       as connect, but begun RATE times a second by all clients together, however long it takes: one that
 *                is begun late, for the one before it took so long, has begun when it was due
 *   persistent   one connection, send and receive by turns
 *   udp          one connected socket, send and receive by turns; an answer that does not come is an error
 *
 * It never goes on for more than PATIENCE after SECONDS, nor contacts another host.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE = 2 /* seconds */, RATE = 50 /* a second */, SIZE = 64, MOST_CLIENTS = 256, STEPS = 16, BUCKETS = 64 * STEPS };
static const uint64_t SECOND = 1000000000;

/* What one client found, on pages shared with the parent. Histogram: STEPS buckets to each power of two, in ns. */
struct tally {
    uint64_t count, errors, longest, took[BUCKETS];
};

static char message[SIZE]; /* upper case and one line, so that a server of lines in upper case echoes it too */
static struct sockaddr_in server;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static int bucket(uint64_t ns)
{
    int power = 63 - __builtin_clzll(ns | STEPS);
    return (power - 4) * STEPS + (int)(ns >> (power - 4)) % STEPS;
}

static double bucket_us(int index)
{
    return (double)((uint64_t)(STEPS + index % STEPS) << (index / STEPS)) / 1000;
}

static int opened(int type)
{
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (type == SOCK_DGRAM) { /* may be lost, so every answer has its time-out */
        struct timeval patience = {.tv_sec = PATIENCE};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    }
    if (connect(fd, (struct sockaddr *)&server, sizeof server) == 0)
        return fd;
    close(fd);
    return -1;
}

/* Send the message and receive as much: 0 when it came back unchanged. */
static int exchange(int fd)
{
    char answer[SIZE];
    size_t have = 0;
    if (send(fd, message, SIZE, MSG_NOSIGNAL) != SIZE)
        return -1;
    while (have < SIZE) {
        ssize_t got = recv(fd, answer + have, SIZE - have, 0);
        if (got <= 0)
            return -1;
        have += (size_t)got;
    }
    return memcmp(answer, message, SIZE) == 0 ? 0 : -1;
}

static int connect_exchange_close(void)
{
    char more;
    int fd = opened(SOCK_STREAM);
    if (fd < 0)
        return -1;
    int result = exchange(fd) == 0 && recv(fd, &more, 1, 0) == 0 ? 0 : -1;
    close(fd);
    return result;
}

static void on_alarm(int signal_number)
{
    (void)signal_number; /* its only use is to interrupt a call */
}

static void note(struct tally *tally, uint64_t ns)
{
    tally->count++;
    tally->took[bucket(ns)]++;
    if (ns > tally->longest)
        tally->longest = ns;
}

static void sleep_until(uint64_t due)
{
    struct timespec t = {.tv_sec = (time_t)(due / SECOND), .tv_nsec = (long)(due % SECOND)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

/* Every client has its own moments, evenly between those of the others. */
static void steady_loop(uint64_t first, uint64_t step, uint64_t end, struct tally *tally)
{
    prctl(PR_SET_TIMERSLACK, 1); /* ns */
    for (uint64_t due = first; due < end; due += step) {
        uint64_t begun = now();
        if (begun < due) {
            sleep_until(due);
            begun = now(); /* it is not the server that wakes us late */
        } else {
            begun = due;
        }
        if (now() >= end || connect_exchange_close() < 0) /* the former: hung up to the end by the one before */
            tally->errors++;
        else
            note(tally, now() - begun);
    }
}

static void closed_loop(char mode, uint64_t end, struct tally *tally)
{
    int fd = -1;
    for (uint64_t before = now(); before < end;) {
        int result;
        if (mode == 'c') {
            result = connect_exchange_close();
        } else {
            if (fd < 0)
                fd = opened(mode == 'u' ? SOCK_DGRAM : SOCK_STREAM);
            result = fd < 0 ? -1 : exchange(fd);
        }
        uint64_t after = now(), ns = after - before;
        if (result < 0) {
            tally->errors++;
            close(fd); /* start afresh: a late answer must not be taken for the next one */
            fd = -1;
        } else if (after <= end) {
            note(tally, ns);
        }
        before = after;
    }
    close(fd);
}

static double percentile(const struct tally *all, double share)
{
    uint64_t wanted = (uint64_t)((double)all->count * share), seen = 0;
    for (int i = 0; i < BUCKETS; i++) {
        seen += all->took[i];
        if (seen > wanted)
            return bucket_us(i);
    }
    return (double)all->longest / 1000;
}

int main(int argc, char **argv)
{
    int clients = argc == 5 ? atoi(argv[3]) : 0;
    double seconds = argc == 5 ? atof(argv[4]) : 0;
    if (clients < 1 || clients > MOST_CLIENTS || seconds <= 0 || seconds > 3600 || !strchr("cspu", argv[1][0])) {
        fprintf(stderr, "usage: load connect|steady|persistent|udp PORT CLIENTS SECONDS\n");
        return 2;
    }
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    memset(message, 'E', SIZE - 1);
    message[SIZE - 1] = '\n';
    prctl(PR_SET_PDEATHSIG, SIGKILL);

    size_t room = sizeof(struct tally) * (size_t)clients;
    struct tally *tallies = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t *end = mmap(NULL, sizeof *end, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int gate[2];
    if (tallies == MAP_FAILED || end == MAP_FAILED || pipe(gate) < 0) {
        perror("load");
        return 1;
    }
    pid_t parent = getpid();
    for (int i = 0; i < clients; i++) {
        pid_t pid = fork();
        if (pid < 0) {
            perror("fork"); /* the clients that are there die with us */
            return 1;
        }
        if (pid == 0) {
            char byte;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent)
                _exit(0);
            close(gate[1]);
            while (read(gate[0], &byte, 1) < 0 && errno == EINTR)
                ; /* end of file: everybody is there, go */
            /* For a server that never answers: calls fail with EINTR, each second lest one had not begun. */
            sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm}, NULL);
            setitimer(ITIMER_REAL, &(struct itimerval){{1, 0}, {(time_t)seconds + PATIENCE, 0}}, NULL);
            if (argv[1][0] == 's') {
                uint64_t begin = *end - (uint64_t)(seconds * (double)SECOND), step = SECOND / RATE;
                steady_loop(begin + (uint64_t)i * step, (uint64_t)clients * step, *end, &tallies[i]);
            } else {
                closed_loop(argv[1][0], *end, &tallies[i]);
            }
            _exit(0);
        }
    }
    *end = now() + (uint64_t)(seconds * (double)SECOND);
    close(gate[1]);
    while (wait(NULL) > 0 || errno == EINTR)
        ;

    struct tally all = {0};
    for (int i = 0; i < clients; i++) {
        all.count += tallies[i].count;
        all.errors += tallies[i].errors;
        all.longest = tallies[i].longest > all.longest ? tallies[i].longest : all.longest;
        for (int j = 0; j < BUCKETS; j++)
            all.took[j] += tallies[i].took[j];
    }
    printf("count=%llu errors=%llu seconds=%g p50_us=%.1f p99_us=%.1f max_us=%.1f\n",
           (unsigned long long)all.count, (unsigned long long)all.errors, seconds, percentile(&all, 0.50),
           percentile(&all, 0.99), (double)all.longest / 1000);
    return 0;
}
