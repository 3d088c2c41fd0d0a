package sentry

import (
	"bytes"
	"encoding/json"
	"net"
	"reflect"
	"testing"

	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"
	"gvisor.dev/gvisor/pkg/state/statefile"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/runsc/boot"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
)

// What the runtime sends is what gVisor reads: every field that we name exists
// there, and comes out with the value that went in.
func TestOrdersAreGVisorsOwn(t *testing.T) {
	link := orders.FDLink{
		Name: "eth0", MTU: 1500, GSOMaxSize: orders.MaxSegmentSize, GVisorGSOEnabled: true, RXChecksumOffload: true,
		LinkAddress: net.HardwareAddr{2, 0, 0, 0, 0, 1}, QDisc: orders.QueueFIFO, NumChannels: 1,
		Addresses: []orders.Address{{Address: net.IPv4(10, 0, 0, 2).To4(), PrefixLen: 30}},
		Routes:    []orders.Route{{Destination: net.IPNet{IP: net.IPv4(10, 0, 0, 0).To4(), Mask: net.CIDRMask(30, 32)}, Gateway: net.IPv4(10, 0, 0, 1).To4()}},
	}
	for name, pair := range map[string][2]any{
		"network": {
			&orders.Network{
				LoopbackLinks: []orders.Loopback{orders.LocalLink}, FDBasedLinks: []orders.FDLink{link}, IsRestore: true,
				Defaultv4Gateway: orders.DefaultRoute{Name: "eth0", Route: link.Routes[0]},
			},
			&boot.CreateLinksAndRoutesArgs{
				LoopbackLinks: []boot.LoopbackLink{boot.DefaultLoopbackLink}, IsRestore: true,
				FDBasedLinks: []boot.FDBasedLink{{
					Name: "eth0", MTU: 1500, GSOMaxSize: stack.GVisorGSOMaxSize, GVisorGSOEnabled: true, RXChecksumOffload: true,
					LinkAddress: link.LinkAddress, QDisc: config.QDiscFIFO, NumChannels: 1,
					Addresses: []boot.IPWithPrefix{{Address: link.Addresses[0].Address, PrefixLen: 30}},
					Routes:    []boot.Route{{Destination: link.Routes[0].Destination, Gateway: link.Routes[0].Gateway}},
				}},
				Defaultv4Gateway: boot.DefaultRoute{Name: "eth0", Route: boot.Route{Destination: link.Routes[0].Destination, Gateway: link.Routes[0].Gateway}},
			},
		},
		"restore": {&orders.Restore{HavePagesFile: true, Background: true}, &boot.RestoreOpts{HavePagesFile: true, Background: true}},
		"save": {
			&orders.Save{Metadata: orders.Uncompressed, HavePagesFile: true, Resume: true},
			&control.SaveOpts{Metadata: statefile.CompressionLevelNone.ToMetadata(), HavePagesFile: true, Resume: true},
		},
		"changes": {&orders.Changes{ContainerID: orders.ContainerID}, &control.TarRootfsUpperLayerOpts{ContainerID: orders.ContainerID}},
	} {
		t.Run(name, func(t *testing.T) { sameOnTheSocket(t, pair[0], pair[1]) })
	}
	theirs := []*control.Process{{PID: 1}}
	theirs[0].Threads = append(theirs[0].Threads, 1, 2)
	data, err := json.Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	var ours []orders.Process
	if err := json.Unmarshal(data, &ours); err != nil || len(ours) != 1 || len(ours[0].Threads) != 2 {
		t.Errorf("processes: %v, %v", ours, err)
	}
}

// sameOnTheSocket holds ours to what theirs is once it was read from the socket.
func sameOnTheSocket(t *testing.T, ours, theirs any) {
	t.Helper()
	sent, err := json.Marshal(ours)
	if err != nil {
		t.Fatal(err)
	}
	want, err := json.Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	into := reflect.New(reflect.TypeOf(theirs).Elem()).Interface()
	dec := json.NewDecoder(bytes.NewReader(sent))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		t.Fatalf("gVisor does not know what we send: %v", err)
	}
	got, err := json.Marshal(into)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("gVisor reads\n%s\nwant\n%s", got, want)
	}
}

func TestNamesAreGVisorsOwn(t *testing.T) {
	for ours, theirs := range map[string]string{
		orders.CallNetwork: boot.ContMgrSetNetworkArgs, orders.CallStart: boot.ContMgrRootContainerStart,
		orders.CallRestore: boot.ContMgrRestore, orders.CallPause: boot.ContMgrPause, orders.CallResume: boot.ContMgrResume,
		orders.CallProcesses: boot.ContMgrProcesses, orders.CallChanges: boot.FsTarRootfsUpperLayer,
		orders.StateFiles[0]: checkpointfiles.StateFileName, orders.StateFiles[1]: checkpointfiles.PagesMetadataFileName,
		orders.StateFiles[2]: checkpointfiles.PagesFileName,
	} {
		if ours != theirs {
			t.Errorf("%q is %q there", ours, theirs)
		}
	}
	flag := orders.MountFlag([]orders.MountConf{{Lower: orders.LowerImage, Size: "4096"}, {Lower: orders.LowerImage}, {Lower: orders.LowerGofer}})
	theirs := specutils.GoferMountConfFlags{
		{Lower: specutils.Erofs, Upper: specutils.AnonOverlay, Size: "4096"},
		{Lower: specutils.Erofs, Upper: specutils.NoOverlay}, {Lower: specutils.Lisafs, Upper: specutils.NoOverlay},
	}
	if want := "--gofer-mount-confs=" + theirs.String(); flag != want {
		t.Errorf("%q, want %q", flag, want)
	}
}
