package daemon

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// collector turns the node's newest samples into metrics at each scrape. It asks
// no sandbox anything, so a scrape costs the same however many there are busy.
type collector struct {
	node *node.Node

	sandboxes, pool, cpu, memory, memoryLimit, disk, diskLimit, pids, rx, tx *prometheus.Desc
}

// newMetrics serves the node's metrics and those of more, each of which may be nil.
func newMetrics(n *node.Node, more ...prometheus.Collector) http.Handler {
	of := []string{"sandbox", "name", "team", "template"}
	c := &collector{
		node:        n,
		sandboxes:   prometheus.NewDesc("atoll_sandboxes", "Sandboxes by state.", []string{"state"}, nil),
		pool:        prometheus.NewDesc("atoll_pool_ready", "Started sandboxes waiting to be claimed.", []string{"template", "runtime"}, nil),
		cpu:         prometheus.NewDesc("atoll_sandbox_cpu_seconds_total", "CPU time consumed.", of, nil),
		memory:      prometheus.NewDesc("atoll_sandbox_memory_bytes", "Memory in use, the runtime's overhead included.", of, nil),
		memoryLimit: prometheus.NewDesc("atoll_sandbox_memory_limit_bytes", "Memory limit; 0 is none.", of, nil),
		disk:        prometheus.NewDesc("atoll_sandbox_disk_bytes", "Bytes written to the root.", of, nil),
		diskLimit:   prometheus.NewDesc("atoll_sandbox_disk_limit_bytes", "Disk limit; 0 is none.", of, nil),
		pids:        prometheus.NewDesc("atoll_sandbox_pids", "Processes and threads.", of, nil),
		rx:          prometheus.NewDesc("atoll_sandbox_receive_bytes_total", "Bytes received.", of, nil),
		tx:          prometheus.NewDesc("atoll_sandbox_transmit_bytes_total", "Bytes sent.", of, nil),
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(c)
	for _, m := range more {
		if m != nil {
			reg.MustRegister(m)
		}
	}
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	list, err := c.node.List(context.Background(), node.Filter{})
	if err != nil {
		return
	}
	states := make(map[sandbox.State]int)
	gauge, counter := prometheus.GaugeValue, prometheus.CounterValue
	for _, sb := range list {
		states[sb.State]++
		samples := c.node.History(sb.ID)
		if len(samples) == 0 || sb.State != sandbox.Running {
			continue
		}
		s := samples[len(samples)-1]
		of := []string{sb.ID, sb.Name, sb.Team, sb.Template}
		for _, m := range []struct {
			desc  *prometheus.Desc
			kind  prometheus.ValueType
			value float64
		}{
			{c.cpu, counter, s.CPU.Seconds()}, {c.memory, gauge, float64(s.Memory)}, {c.memoryLimit, gauge, float64(s.MemoryLimit)},
			{c.disk, gauge, float64(s.Disk)}, {c.diskLimit, gauge, float64(s.DiskLimit)}, {c.pids, gauge, float64(s.Pids)},
			{c.rx, counter, float64(s.RxBytes)}, {c.tx, counter, float64(s.TxBytes)},
		} {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value, of...)
		}
	}
	for state, count := range states {
		ch <- prometheus.MustNewConstMetric(c.sandboxes, gauge, float64(count), string(state))
	}
	for _, p := range c.node.Pools() {
		ch <- prometheus.MustNewConstMetric(c.pool, gauge, float64(p.Ready), p.Template, p.Runtime)
	}
}
