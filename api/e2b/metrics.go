package e2b

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// sandboxMetric is what a sandbox used at one moment.
type sandboxMetric struct {
	Timestamp  time.Time `json:"timestamp"`
	Unix       int64     `json:"timestampUnix"`
	CPUCount   int       `json:"cpuCount"`
	CPUUsedPct float64   `json:"cpuUsedPct"` // of all its cores together
	MemUsed    int64     `json:"memUsed"`    // bytes, as all below
	MemTotal   int64     `json:"memTotal"`
	MemCache   int64     `json:"memCache"`
	DiskUsed   int64     `json:"diskUsed"`
	DiskTotal  int64     `json:"diskTotal"`
}

// metricsOf turns a run's samples, oldest first, into metrics. CPU time counts
// up; what is reported is its growth since the sample before.
func metricsOf(samples []sandbox.Stats, limits sandbox.Resources, began time.Time) []sandboxMetric {
	out := make([]sandboxMetric, 0, len(samples))
	cpus := sizeOf(limits).cpus
	before := sandbox.Stats{Time: began}
	for _, s := range samples {
		m := sandboxMetric{
			Timestamp: s.Time.UTC(), Unix: s.Time.Unix(), CPUCount: cpus,
			MemUsed: s.Memory, MemTotal: max(s.MemoryLimit, limits.Memory), DiskUsed: s.Disk, DiskTotal: max(s.DiskLimit, limits.Disk),
		}
		if wall := s.Time.Sub(before.Time); wall > 0 && s.CPU >= before.CPU {
			m.CPUUsedPct = min(100, float64(s.CPU-before.CPU)/float64(wall)/float64(cpus)*100)
		}
		out = append(out, m)
		before = s
	}
	return out
}

// within keeps the metrics of an interval; a zero bound does not bound.
func within(all []sandboxMetric, start, end time.Time) []sandboxMetric {
	out := make([]sandboxMetric, 0, len(all))
	for _, m := range all {
		if !start.IsZero() && m.Unix < start.Unix() || !end.IsZero() && m.Unix > end.Unix() {
			continue
		}
		out = append(out, m)
	}
	return out
}

// samples are the sandbox's, with one of this moment for a sandbox so young
// that none has been taken yet.
func (a *api) samples(ctx context.Context, sb node.Sandbox) []sandbox.Stats {
	all := a.node.History(sb.ID)
	if len(all) > 0 || sb.State != sandbox.Running {
		return all
	}
	s, err := a.node.Stats(ctx, sb.ID)
	if err != nil {
		return nil // it may be ending just now
	}
	return []sandbox.Stats{s}
}

func (a *api) metrics(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	start, end, err := parseInterval(r.URL.Query(), time.Second)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		all := metricsOf(a.samples(r.Context(), sb), sb.Spec.Resources, sb.StartedAt)
		writeJSON(w, http.StatusOK, within(all, start, end))
		return nil
	})
}

// maxMetricSandboxes bounds one request for the metrics of many.
const maxMetricSandboxes = 100

// manyMetrics returns the newest metric of each sandbox asked for that is there.
func (a *api) manyMetrics(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	var ids []string
	for _, p := range r.URL.Query()["sandbox_ids"] {
		for id := range strings.SplitSeq(p, ",") {
			if id != "" {
				ids = append(ids, id)
			}
		}
	}
	if len(ids) == 0 || len(ids) > maxMetricSandboxes {
		a.reject(w, r, "between 1 and %d sandbox_ids are needed", maxMetricSandboxes)
		return
	}
	out := make(map[string]sandboxMetric, len(ids))
	for _, id := range ids {
		sb, err := a.lookup(r.Context(), key, id)
		if err != nil {
			continue
		}
		if all := metricsOf(a.samples(r.Context(), sb), sb.Spec.Resources, sb.StartedAt); len(all) > 0 {
			out[sb.ID] = all[len(all)-1]
		}
	}
	writeJSON(w, http.StatusOK, struct {
		Sandboxes map[string]sandboxMetric `json:"sandboxes"`
	}{out})
}
