/* A front end that offers frames at a rate: two virtio_user ports of DPDK's, each sending to the other, paced by the
 * processor's clock. It reads lines "NUMBER RATE MILLISECONDS SIZES..." (frames per second of both directions together;
 * frame lengths with their checksum, taken in turn) and answers "result NUMBER offered sent received p50 p99 p999" with
 * times in nanoseconds. The ring code at this end is DPDK's. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>

#define RING 1024
#define BURST 32
#define MBUFS 16383
#define SIZES_MAX 64
#define MAGIC UINT64_C(0x7663702d70616365)
/* Longer than so behind its time, what could not be sent is lost: a tester does not wait for what it tests. */
#define LATE_MS 10
#define DRAIN_MS 50
/* Times in steps of a sixteenth of their power of two. */
#define STEPS 1024

struct payload {
    uint64_t magic, trial, stamp;
};

static struct rte_mempool *pool;
static uint64_t histogram[STEPS];

static unsigned step_of(uint64_t ns)
{
    if (ns < 16)
        return (unsigned)ns;
    unsigned power = 63 - (unsigned)__builtin_clzll(ns);
    unsigned step = (power - 3) * 16 + (unsigned)((ns >> (power - 4)) & 15);
    return step < STEPS ? step : STEPS - 1;
}

static uint64_t time_of(unsigned step)
{
    if (step < 16)
        return step;
    unsigned power = step / 16 + 3;
    return (UINT64_C(16) + step % 16) << (power - 4);
}

static uint64_t share(uint64_t total, double part)
{
    uint64_t wanted = (uint64_t)((double)total * part), seen = 0;
    for (unsigned step = 0; step < STEPS; step++) {
        seen += histogram[step];
        if (seen > wanted)
            return time_of(step);
    }
    return 0;
}

static void set_up(uint16_t port)
{
    struct rte_eth_conf conf;
    struct rte_eth_dev_info info;
    memset(&conf, 0, sizeof conf);
    if (rte_eth_dev_info_get(port, &info) != 0)
        rte_exit(1, "no port %u\n", port);
    conf.rxmode.mtu = RTE_MIN(9000u, info.max_mtu);
    if (rte_eth_dev_configure(port, 1, 1, &conf) != 0 ||
        rte_eth_rx_queue_setup(port, 0, RING, rte_socket_id(), NULL, pool) != 0 ||
        rte_eth_tx_queue_setup(port, 0, RING, rte_socket_id(), NULL) != 0 || rte_eth_dev_start(port) != 0)
        rte_exit(1, "cannot start port %u\n", port);
}

static unsigned send_some(uint16_t port, unsigned count, uint64_t trial, const unsigned *sizes, unsigned kinds,
                          uint64_t number)
{
    struct rte_mbuf *frames[BURST];
    if (rte_pktmbuf_alloc_bulk(pool, frames, count) != 0)
        return 0;
    struct rte_ether_addr to = {{2, 0, 0, 0, 0, (uint8_t)(2 - port)}};
    struct rte_ether_addr from = {{2, 0, 0, 0, 0, (uint8_t)(1 + port)}};
    for (unsigned at = 0; at < count; at++) {
        unsigned len = sizes[(number + at) % kinds] - RTE_ETHER_CRC_LEN;
        struct rte_ether_hdr *head = rte_pktmbuf_mtod(frames[at], struct rte_ether_hdr *);
        struct payload *payload = (struct payload *)(head + 1);
        head->dst_addr = to;
        head->src_addr = from;
        head->ether_type = rte_cpu_to_be_16(0x88b5);
        payload->magic = MAGIC;
        payload->trial = trial;
        payload->stamp = rte_rdtsc();
        frames[at]->data_len = (uint16_t)len;
        frames[at]->pkt_len = len;
    }
    unsigned sent = rte_eth_tx_burst(port, 0, frames, (uint16_t)count);
    if (sent < count)
        rte_pktmbuf_free_bulk(&frames[sent], count - sent);
    return sent;
}

static uint64_t receive(uint16_t port, uint64_t trial, double ns_per_tick)
{
    struct rte_mbuf *frames[BURST];
    uint16_t got = rte_eth_rx_burst(port, 0, frames, BURST);
    uint64_t ours = 0;
    if (got == 0)
        return 0;
    uint64_t now = rte_rdtsc();
    for (unsigned at = 0; at < got; at++) {
        struct payload *payload = rte_pktmbuf_mtod_offset(frames[at], struct payload *, sizeof(struct rte_ether_hdr));
        if (frames[at]->data_len >= 60 && payload->magic == MAGIC && payload->trial == trial) {
            ours++;
            histogram[step_of((uint64_t)((double)(now - payload->stamp) * ns_per_tick))]++;
        }
    }
    rte_pktmbuf_free_bulk(frames, got);
    return ours;
}

static void trial(uint64_t number, double rate, double ms, const unsigned *sizes, unsigned kinds)
{
    uint64_t hz = rte_get_tsc_hz(), begin = rte_rdtsc(), length = (uint64_t)((double)hz * ms / 1000);
    uint64_t late = (uint64_t)(rate * LATE_MS / 1000) + BURST, gone = 0, sent[2] = {0, 0}, received = 0, tries = 0;
    double per_tick = rate / (double)hz, ns_per_tick = 1e9 / (double)hz;
    memset(histogram, 0, sizeof histogram);
    for (;;) {
        uint64_t since = rte_rdtsc() - begin;
        if (since >= length)
            break;
        uint64_t due = (uint64_t)((double)since * per_tick), done = sent[0] + sent[1] + gone;
        if (due > done) {
            unsigned count = (unsigned)RTE_MIN(due - done, (uint64_t)BURST);
            uint16_t port = (uint16_t)(tries++ & 1);
            sent[port] += send_some(port, count, number, sizes, kinds, sent[port]);
            done = sent[0] + sent[1] + gone;
            if (due > done + late)
                gone += due - done - late;
        }
        received += receive(0, number, ns_per_tick) + receive(1, number, ns_per_tick);
    }
    /* What was due and neither sent nor given up, but for a burst that had no time left. */
    uint64_t due = (uint64_t)((double)length * per_tick), done = sent[0] + sent[1] + gone;
    uint64_t offered = due > done + BURST ? due : done;
    uint64_t end = rte_rdtsc() + hz * DRAIN_MS / 1000;
    while (rte_rdtsc() < end)
        received += receive(0, number, ns_per_tick) + receive(1, number, ns_per_tick);
    printf("result %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", number,
           offered, sent[0] + sent[1], received, share(received, 0.5), share(received, 0.99),
           share(received, 0.999));
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (rte_eal_init(argc, argv) < 0)
        rte_exit(1, "EAL does not start\n");
    if (rte_eth_dev_count_avail() != 2)
        rte_exit(1, "two ports are needed\n");
    pool = rte_pktmbuf_pool_create("frames", MBUFS, 256, 0, 9216 + RTE_PKTMBUF_HEADROOM, (int)rte_socket_id());
    if (pool == NULL)
        rte_exit(1, "no memory for frames\n");
    set_up(0);
    set_up(1);
    printf("started\n");
    fflush(stdout);
    char line[1024];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char *rest = line;
        uint64_t number = strtoull(rest, &rest, 10);
        double rate = strtod(rest, &rest), ms = strtod(rest, &rest);
        unsigned sizes[SIZES_MAX], kinds = 0;
        for (;;) {
            char *end;
            unsigned long size = strtoul(rest, &end, 10);
            if (end == rest || kinds == SIZES_MAX)
                break;
            rest = end;
            if (size >= 64 && size <= 9018)
                sizes[kinds++] = (unsigned)size;
        }
        if (kinds == 0 || rate <= 0 || ms <= 0)
            rte_exit(1, "not understood: %s", line);
        trial(number, rate, ms, sizes, kinds);
    }
    rte_eal_cleanup();
    return 0;
}
