// Package wire holds what both ends of the guest protocol agree on besides its
// .proto files: header names, the bodies of the plain HTTP calls, signatures of
// file URLs, and how names that are not valid UTF-8 travel in text.
package wire

import "time"

// Version is the version of E2B's envd whose protocol the guest speaks. E2B's
// clients switch features on by it.
const Version = "0.6.4"

// Headers of the protocol.
const (
	HeaderToken      = "X-Access-Token"          // the sandbox's access token
	HeaderKeepalive  = "Keepalive-Ping-Interval" // seconds between keepalive events on a silent stream
	HeaderTimeout    = "Connect-Timeout-Ms"      // how long a stream, and the process it started, may last
	HeaderMetadata   = "X-Metadata-"             // prefix of headers that set a file's metadata
	MetadataXattr    = "user.e2b."               // prefix of the extended attributes that hold metadata
	UpgradeProtocol  = "tcp"                     // the Upgrade header's value on /connect
	TagMain          = "main"                    // output of processes with this tag goes to /logs
	MaxMetadataBytes = 4096                      // of one value, the smallest limit among common file systems
)

// Init is the body of POST /init. Absent fields change nothing.
type Init struct {
	EnvVars        map[string]string `json:"envVars,omitempty"`     // replaces the environment of processes started later
	AccessToken    *string           `json:"accessToken,omitempty"` // every other call needs it from then on
	Timestamp      *time.Time        `json:"timestamp,omitempty"`   // sets the clock of a machine of its own
	DefaultUser    *string           `json:"defaultUser,omitempty"`
	DefaultWorkdir *string           `json:"defaultWorkdir,omitempty"`
	Hostname       string            `json:"hostname,omitempty"` // of an agent that is PID 1; also written to /etc/hostname and /etc/hosts
	Entropy        []byte            `json:"entropy,omitempty"`  // seeds the kernel's random numbers, at most 4096 bytes
	CABundle       string            `json:"caBundle,omitempty"` // PEM, added to the trusted authorities of an agent that is PID 1
	// Continues says that this is the same life of the sandbox as before, and who was connected still is: after a move.
	Continues bool `json:"continues,omitempty"`
}

// Metrics is the answer of GET /metrics, in bytes unless the name says otherwise.
type Metrics struct {
	Timestamp   int64   `json:"ts"` // Unix seconds
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"` // of all CPUs together, since the previous call
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

// FileInfo is one entry of the answer of POST /files.
type FileInfo struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"` // always "file"
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Error is the body of a plain HTTP call that failed.
type Error struct {
	Code    int    `json:"code"` // the HTTP status
	Message string `json:"message"`
}

// The kinds of LogEntry.
const (
	LogStart  = "start"  // a process started
	LogExit   = "exit"   // a process ended
	LogStdout = "stdout" // a line of a process with TagMain
	LogStderr = "stderr"
)

// LogEntry is one line of GET /logs.
type LogEntry struct {
	Seq      uint64    `json:"seq"` // grows by one; a gap means entries were dropped
	Time     time.Time `json:"time"`
	Event    string    `json:"event"`
	PID      int       `json:"pid"`
	Tag      string    `json:"tag,omitempty"`
	User     string    `json:"user,omitempty"`     // LogStart
	Cmd      []string  `json:"cmd,omitempty"`      // LogStart
	Line     string    `json:"line,omitempty"`     // LogStdout, LogStderr, without the newline
	ExitCode *int      `json:"exitCode,omitempty"` // LogExit; -1: ended by a signal
	Status   string    `json:"status,omitempty"`   // LogExit
	Error    string    `json:"error,omitempty"`    // LogExit
}
