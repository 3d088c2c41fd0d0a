package openai

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/engine"
	"github.com/atoll-run/atoll/llm/host"
)

// collector turns the counts of engines into metrics at each scrape.
type collector struct {
	host    *host.Host
	answers *cache.Answers
	counts  []count
	first   *prometheus.Desc
	found   *prometheus.Desc
}

// count is one number of an engine.
type count struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(engine.Stats) float64
}

// NewCollector makes the metrics of the models of a host. answers may be nil.
func NewCollector(h *host.Host, answers *cache.Answers) prometheus.Collector {
	of := []string{"model"}
	counter, gauge := prometheus.CounterValue, prometheus.GaugeValue
	c := &collector{host: h, answers: answers,
		first: prometheus.NewDesc("atoll_model_first_token_seconds", "Time from a request to the first token of its answer.", of, nil),
		found: prometheus.NewDesc("atoll_model_answers_total", "Requests that were looked up among the answers kept.", []string{"result"}, nil),
	}
	for _, n := range []struct {
		name, help string
		kind       prometheus.ValueType
		read       func(engine.Stats) float64
	}{
		{"running", "Answers under way.", gauge, func(s engine.Stats) float64 { return float64(s.Running) }},
		{"waiting", "Requests in the queue.", gauge, func(s engine.Stats) float64 { return float64(s.Waiting) }},
		{"requests_total", "Answers begun.", counter, func(s engine.Stats) float64 { return float64(s.Requests) }},
		{"refused_total", "Requests refused since the queue was full.", counter, func(s engine.Stats) float64 { return float64(s.Refused) }},
		{"canceled_total", "Answers given up by their clients.", counter, func(s engine.Stats) float64 { return float64(s.Canceled) }},
		{"prompt_tokens_total", "Tokens of prompts.", counter, func(s engine.Stats) float64 { return float64(s.PromptTokens) }},
		{"answer_tokens_total", "Tokens generated.", counter, func(s engine.Stats) float64 { return float64(s.AnswerTokens) }},
		{"guessed_tokens_total", "Tokens guessed ahead.", counter, func(s engine.Stats) float64 { return float64(s.Guessed) }},
		{"guessed_right_total", "Tokens guessed ahead that were right.", counter, func(s engine.Stats) float64 { return float64(s.Right) }},
		{"busy_seconds_total", "Time spent in forward passes.", counter, func(s engine.Stats) float64 { return s.Busy.Seconds() }},
		{"cache_hit_tokens_total", "Tokens of prompts found in the prefix cache.", counter, func(s engine.Stats) float64 { return float64(s.Cache.Hits) }},
		{"cache_miss_tokens_total", "Tokens of prompts not found there.", counter, func(s engine.Stats) float64 { return float64(s.Cache.Misses) }},
		{"cache_used_pages", "Pages of keys and values in use.", gauge, func(s engine.Stats) float64 { return float64(s.Cache.Used) }},
		{"cache_written_pages_total", "Pages that went to disk.", counter, func(s engine.Stats) float64 { return float64(s.Cache.Written) }},
		{"cache_read_pages_total", "Pages that came back from disk.", counter, func(s engine.Stats) float64 { return float64(s.Cache.Read) }},
		{"cache_lost_pages_total", "Pages that could not be written or read.", counter, func(s engine.Stats) float64 { return float64(s.Cache.Lost) }},
		{"cache_disk_bytes", "Bytes of pages on disk.", gauge, func(s engine.Stats) float64 { return float64(s.Cache.Disk) }},
		{"cache_pages", "Pages of keys and values.", gauge, func(s engine.Stats) float64 { return float64(s.Cache.Pages) }},
	} {
		c.counts = append(c.counts, count{prometheus.NewDesc("atoll_model_"+n.name, n.help, of, nil), n.kind, n.read})
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, n := range c.counts {
		ch <- n.desc
	}
	ch <- c.first
	ch <- c.found
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	for _, m := range c.host.Loaded() {
		s := m.Engine.Stats()
		for _, n := range c.counts {
			ch <- prometheus.MustNewConstMetric(n.desc, n.kind, n.read(s), m.Name)
		}
		ch <- prometheus.MustNewConstHistogram(c.first, s.FirstCount, s.FirstSum, s.First, m.Name)
	}
	if c.answers != nil {
		hits, misses := c.answers.Counts()
		ch <- prometheus.MustNewConstMetric(c.found, prometheus.CounterValue, float64(hits), "found")
		ch <- prometheus.MustNewConstMetric(c.found, prometheus.CounterValue, float64(misses), "missing")
	}
}
