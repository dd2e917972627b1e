// A Java program that keeps what it allocates, and answers as target.h does.
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.ArrayList;
import java.util.List;

public final class Pages {
    static final List<byte[]> kept = new ArrayList<>();
    static long sum;

    // Large enough that the collector leaves the arrays where they are.
    static void keepsForever() {
        byte[] block = new byte[4 << 20];
        block[0] = 1;
        kept.add(block);
    }

    static void usesForAMoment() {
        byte[] block = new byte[1 << 10];
        sum += block[(int) (sum % block.length)];
    }

    public static void main(String[] arguments) throws Exception {
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        System.out.println("ready");
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String[] words = line.split(" ");
            if (words[0].equals("quit")) System.exit(Integer.parseInt(words[1]));
            if (words[0].equals("leak")) {
                for (int i = 0; i < Integer.parseInt(words[1]) / 4; i++) {
                    keepsForever();
                    for (int j = 0; j < 1000; j++) usesForAMoment();
                }
            }
            System.out.println("done");
        }
    }
}
